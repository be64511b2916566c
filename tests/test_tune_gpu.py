"""What benchmarks/tune_gpu.py makes of candidates and results; kernels are interpreted."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from versions import newest_jax

from vqcx_jax.ops import device

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CASE = "log_z 16x16"


@pytest.fixture(scope="module")
def tune() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("tune_gpu")
    for name in ("tune_gpu", "records", "timing"):
        del sys.modules[name]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H100 80GB HBM3"))


def test_without_a_gpu(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["tune_gpu.py", CASE, f"--results={results}"])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2 and not results.exists()
    assert capsys.readouterr().err.endswith("device 'cpu': kernels are for Hopper GPUs\n")


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_candidates_are_tiles(tune: Any, hopper: None, part: str) -> None:
    for tuned in tune.CASES.values():
        sizes = tune.ordered(tuned, part)
        assert len(set(sizes)) == len(sizes) >= 8
        for candidate in sizes:
            tile = tuned.blocks.Tile(*candidate)
            tuned.blocks.check(tuned.blocks.BlockSizes()._replace(**{part: tile}))
        # The nearest ones come first: one size is another.
        today = getattr(tuned.today(), part)
        assert sum(a != b for a, b in zip(sizes[0], today, strict=True)) == 1


@newest_jax
@pytest.mark.parametrize("kernel, part", [("loss", "backward"), ("turn", "forward")])
def test_times_both(tune: Any, hopper: None, kernel: str, part: str) -> None:
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    small = tune._loss(3, 70, (5, 7)) if kernel == "loss" else tune._turn(9, 1, 32)
    other, unusable = {"loss": ((128, 2), (80, 2)), "turn": ((1024, 4), (100, 4))}[kernel]
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = tune.time_beside_today(small, part, other, repeats=2)
        refused = tune.time_beside_today(small, part, unusable, repeats=2)
    assert len(found["ms"]) == len(found["ms_of_today"]) == 2
    assert min(*found["ms"], *found["ms_of_today"]) > 0
    size = {"loss": "tokens=80", "turn": "size=100"}[kernel]
    assert refused["why"].startswith(f"does not compile: {size} of the {part} tile: must be")


def test_goes_on_and_ranks(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, hopper: None
) -> None:
    asked = []

    def timed(tuned: Any, part: str, sizes: Any, repeats: int) -> Any:
        asked.append(sizes)
        of_today = {"ms_of_today": [2.0] * repeats}
        if len(asked) == 1:
            return {"why": "does not compile: too much shared memory"}
        if len(asked) == 2:  # Best by its median, and once slower.
            return {**of_today, "ms": [1.0] * (repeats - 1) + [2.1]}
        if len(asked) == 3:
            return {**of_today, "ms": [1.5] * repeats}
        return {**of_today, "ms": [3.0] * repeats}

    monkeypatch.setattr(tune, "time_beside_today", timed)
    monkeypatch.setattr(tune.gpu, "require_hopper", lambda: None)  # Of the oldest jax, too.
    results = tmp_path / "results.jsonl"
    arguments = ["tune_gpu.py", CASE, f"--results={results}", "--repeats=3", "--parts=forward"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--minutes=0"])
    tune.main()
    assert not asked and capsys.readouterr().out.endswith(": (128, 2),  # forward\n\n")
    monkeypatch.setattr(sys, "argv", arguments)
    tune.main()
    candidates = tune.ordered(tune.CASES[CASE], "forward")
    assert asked == candidates
    lines = results.read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["asked"]["sizes"] == list(candidates[0])
    results.write_text("".join(lines[:5]))  # As if it had been stopped.
    tune.main()
    assert asked == candidates + candidates[5:]
    printed = capsys.readouterr().out
    # Beside another tile all are timed again.
    others = tune.loss_blocks.BlockSizes(forward=tune.loss_blocks.Tile(*candidates[0]))
    monkeypatch.setattr(tune.loss_blocks, "block_sizes", lambda kind: others)
    assert len(list(tune.missing(CASE, "forward", tune.read(results)))) == len(candidates)
    head, first, second, *_, why, row, _ = printed.splitlines()
    n = len(candidates)
    assert head.startswith(f"{CASE}, forward, NVIDIA H100 80GB HBM3: {n} of {n} candidates")
    assert first.endswith("0.500 [0.500 - 1.050] of today's time")
    assert second.endswith("0.750 [0.750 - 0.750] of today's time")
    assert why.endswith("does not compile: too much shared memory")
    assert row == f'"NVIDIA H100 80GB HBM3": {candidates[2]},  # forward'
