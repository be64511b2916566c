"""The queue and the report of benchmarks/campaign.py; training itself is tested elsewhere."""

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "campaign.py"


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    sys.path.insert(0, str(PATH.parent))  # As for the script: it imports its neighbours.
    spec = importlib.util.spec_from_file_location("benchmark_campaign", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(PATH.parent))


@pytest.fixture
def campaign(module: Any) -> Any:
    return module.Campaign(
        config="configs/quickstart.py",
        overrides={"train.steps": 5},
        variants={
            "full": module.Variant({"model.head.kind": "full"}),
            "vq": module.Variant({"model.head.kind": "vq"}, token_map="kmeans"),
        },
        maps={"kmeans": {"method": "kmeans"}},
        baseline="full",
        learning_rate=1.0,
        seeds=3,
    )


def record(module: Any, campaign: Any, run: Any, loss: float | None) -> dict[str, Any]:
    return {
        "variant": run.variant,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "asked": run.asked(campaign),
        "loss": loss,
        "vocab_size": 1000,
        "embed_dim": 10,
        "head_vectors": 10_000 if run.variant == "full" else 100,
        "head_scalars": 1000,
        "code_bits": 0 if run.variant == "full" else 8000,
        "seconds_per_step": 2.0 if run.variant == "full" else 0.5,
    }


def drain(module: Any, campaign: Any, name: str, loss: Any, path: Path) -> list[tuple[float, int]]:
    """All runs of a variant, each read back from the file before the next is asked for."""
    done = []
    while runs := module._ready(campaign, name, module._read(path)):
        run = runs[0]
        value = loss(run.learning_rate, run.seed)
        with path.open("a") as file:
            file.write(json.dumps(record(module, campaign, run, value)) + "\n")
        done.append((run.learning_rate, run.seed))
    return done


def test_the_rate_is_searched_until_both_neighbours_are_worse(
    module: Any, campaign: Any, tmp_path: Path
) -> None:
    """Best at 4: from 1 up to 8, then the other seeds at 4."""
    runs = drain(
        module, campaign, "full", lambda lr, _: abs(math.log2(lr) - 2), tmp_path / "r.jsonl"
    )
    assert runs == [(1, 0), (2, 0), (4, 0), (8, 0), (4, 1), (4, 2)]


def test_the_rate_is_searched_downwards(module: Any, campaign: Any, tmp_path: Path) -> None:
    runs = drain(
        module, campaign, "full", lambda lr, _: abs(math.log2(lr) + 2), tmp_path / "r.jsonl"
    )
    assert runs == [(1, 0), (2, 0), (0.5, 0), (0.25, 0), (0.125, 0), (0.25, 1), (0.25, 2)]


def test_a_run_that_diverged_is_the_worst(module: Any, campaign: Any, tmp_path: Path) -> None:
    runs = drain(
        module, campaign, "full", lambda lr, _: None if lr > 1 else 3.0 - lr, tmp_path / "r.jsonl"
    )
    assert runs == [(1, 0), (2, 0), (0.5, 0), (1, 1), (1, 2)]


def test_another_question_has_other_results(module: Any, campaign: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    drain(module, campaign, "vq", lambda lr, _: abs(lr - 1), path)
    assert module._ready(campaign, "vq", module._read(path)) == []
    other = module.dataclasses.replace(campaign, maps={"kmeans": {"method": "kmeans", "seed": 1}})
    asked = module._ready(other, "vq", module._read(path))
    assert asked == [module.Run("vq", rate, 0) for rate in (1.0, 2.0)]


def test_a_map_of_another_short_run_is_another_question(
    module: Any, campaign: Any, tmp_path: Path
) -> None:
    """Also once the question has been through the results file, as JSON."""

    def of(steps: int) -> Any:
        options = {"method": "kmeans", "vectors": module.ShortRun({"train.steps": steps})}
        return module.dataclasses.replace(campaign, maps={"kmeans": options})

    path = tmp_path / "r.jsonl"
    drain(module, of(5), "vq", lambda lr, _: abs(lr - 1), path)
    assert module._ready(of(5), "vq", module._read(path)) == []
    assert module._ready(of(6), "vq", module._read(path)) != []


def test_divergence_is_a_result_and_a_bug_is_none(module: Any) -> None:
    """As `test_scripts.test_divergence` has it: exit code 1 and one line."""
    line = "error: loss is nan at step 3; last good checkpoint: there is none"
    assert module._diverged(1 << 8, line)
    assert not module._diverged(1 << 8, "Traceback (most recent call last):")
    assert not module._diverged(2 << 8, "error: train.steps=0: must be positive")
    assert not module._diverged(9, "") and not module._diverged(0, "")


def test_report(
    module: Any, campaign: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.jsonl"
    drain(module, campaign, "full", lambda lr, seed: 1 + abs(lr - 1) + seed, path)
    drain(module, campaign, "vq", lambda lr, seed: 1.1 + abs(lr - 1) + seed, path)
    module._report(campaign, path, None)
    full, vq = (
        line for line in capsys.readouterr().out.splitlines() if line[:6] in ("| full", "| vq |")
    )
    assert full.startswith("| full | 100.00% | 110.00% | 0 | 110.0% | 1 | 3 |")
    assert full.endswith("| 1.000 ± 0.000 | 1.00 |")
    # (2 (100 + 1000) + 1000 bytes of codes) / 20,000; every seed has exp(0.1) times the perplexity.
    assert vq.startswith("| vq | 1.00% | 11.00% | 8 | 16.0% | 1 | 3 |")
    assert vq.endswith("| 1.105 ± 0.000 | 0.25 |")


def test_attention_report(
    module: Any, campaign: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Differences to the baseline with the same seed, 0.1 +- 0.01, tested against 0."""
    path = tmp_path / "r.jsonl"
    losses = {"full": [1.0, 2.0, 3.0], "vq": [1.09, 2.1, 3.11]}
    with path.open("w") as file:
        for name, of_seeds in losses.items():
            for seed, loss in enumerate(of_seeds):
                run = record(module, campaign, module.Run(name, 1.0, seed), loss)
                positions = [[0, 3, 8.0 * loss, 8], [4, 7, 4.0 * loss, 4]]
                file.write(json.dumps(run | {"by_length": {"8": positions}}) + "\n")
    module._report(module.dataclasses.replace(campaign, report="attention"), path, None)
    lines = capsys.readouterr().out.splitlines()
    assert "| full | 1 | 3 | 10.06 ± 5.19 |  |  |" in lines
    # t = 0.1 / (0.01 / sqrt(3)) with two degrees of freedom.
    assert "| vq | 1 | 3 | 11.19 ± 5.81 | 0.1000 ± 0.0058 | 0.003 |" in lines
    assert "| rows of 8, by position | 0 to 3 | 4 to 7 |" in lines
    assert "| vq | 11.19 ± 5.81 | 11.19 ± 5.81 |" in lines


def test_more_seeds_for_some(module: Any, campaign: Any, tmp_path: Path) -> None:
    more = module.dataclasses.replace(campaign, more_seeds={"vq": 5})
    path = tmp_path / "r.jsonl"
    assert len(drain(module, more, "full", lambda lr, _: abs(lr - 1), path)) == 3 + 2
    assert len(drain(module, more, "vq", lambda lr, _: abs(lr - 1), path)) == 3 + 4


def test_report_against_another_baseline(
    module: Any,
    campaign: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "r.jsonl"
    drain(module, campaign, "full", lambda lr, seed: 1 + abs(lr - 1) + seed, path)
    drain(module, campaign, "vq", lambda lr, seed: 1.1 + abs(lr - 1) + seed, path)
    monkeypatch.setattr(module, "load", lambda *_: campaign)
    arguments = ["campaign.py", "report", "x.py", f"--results={path}"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--baseline=vq"])
    module.main()
    full = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| full"))
    assert full.endswith("| 0.905 ± 0.000 | 4.00 |")
    monkeypatch.setattr(sys, "argv", [*arguments, "--baseline=none"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "--baseline='none': must be one of ['full', 'vq'" in capsys.readouterr().err


def test_times(
    module: Any, campaign: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Variants take turns, for few steps."""
    import campaign_times

    runs = []

    def train(shortened: Any, run: Any, *_: Any) -> dict[str, float]:
        runs.append((run.variant, shortened.overrides["train.steps"]))
        return {"seconds_per_step": len(runs) / 10}

    monkeypatch.setattr(campaign_times, "load", lambda *_: campaign)
    monkeypatch.setattr(campaign_times, "train", train)
    arguments = ["campaign_times.py", "x.py", "--work=w", "--steps=30"]
    monkeypatch.setattr(sys, "argv", arguments)
    campaign_times.main()
    assert runs == [("full", 30), ("vq", 30), ("full", 30), ("vq", 30)]
    assert "| vq | 0.300 | 0.200 - 0.400 | 1.50 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "none"])
    with pytest.raises(SystemExit, match="2"):
        campaign_times.main()
    assert "--only ['none']: must be among ['full', 'vq']" in capsys.readouterr().err
