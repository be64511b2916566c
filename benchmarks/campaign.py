"""Trains what a campaign lists, one run after the other, and reports what came out.

    python benchmarks/campaign.py run CAMPAIGN.py --data=DIR --work=DIR --results=FILE.jsonl
    python benchmarks/campaign.py report CAMPAIGN.py --data=DIR --results=FILE.jsonl --plot=FILE.svg

CAMPAIGN.py has a function `campaign(data: Path) -> Campaign`, see benchmarks/campaigns/. Every run
is `train.py` in a process of its own and leaves one line of JSON: what was asked for, losses,
sizes, times. A run that has its line is not done again, so the command can be stopped at any time
and goes on where it was. Variants share everything but what they name; each has its own learning
rate, found with seed 0 by the same search (powers of two from one start, until both neighbours of
the best are worse); the other seeds use that rate.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import reports

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing to compare.

    Attributes:
        overrides: config field -> value, beside the campaign's.
        token_map: name of one of the campaign's maps, for a head of codes.
    """

    overrides: Mapping[str, object]
    token_map: str | None = None


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What to train and how.

    Attributes:
        config: the configuration file that all runs share.
        overrides: config field -> value, for all runs.
        paths: config field -> where something lies on this machine; not part of a result.
        variants: by name, in the order in which they are run.
        baseline: the variant that the others are compared with.
        maps: token maps by name: options of `python -m vqcx_jax.maps`.
        learning_rate: where the search begins.
        seeds: how many.
        more_seeds: variant -> how many, for those of which more is to be known.
        report: which tables, see `reports.OF_KIND`.
        lengths: trained models are evaluated in rows of so many tokens, too, by position.
    """

    config: str
    overrides: Mapping[str, object]
    variants: Mapping[str, Variant]
    baseline: str
    paths: Mapping[str, object] = dataclasses.field(default_factory=dict)
    maps: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    learning_rate: float = 4e-3
    seeds: int = 3
    more_seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    report: str = "heads"
    lengths: tuple[int, ...] = ()

    def seeds_of(self, variant: str) -> int:
        """How many seeds a variant is trained with."""
        return max(self.seeds, self.more_seeds.get(variant, 0))


@dataclasses.dataclass(frozen=True)
class Run:
    """One line of the results."""

    variant: str
    learning_rate: float
    seed: int

    def asked(self, campaign: Campaign) -> dict[str, Any]:
        """Everything that decides what comes out: results of another question are not reused."""
        variant = campaign.variants[self.variant]
        return {
            "config": campaign.config,
            "overrides": {**campaign.overrides, **variant.overrides},
            "map": campaign.maps[variant.token_map] if variant.token_map else None,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


Results = dict[str, dict[str, Any]]  # Key of what was asked -> record.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("campaign", type=Path)
    parser.add_argument("--data", type=Path, default=Path(), help="where the campaign's text is")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--work", type=Path, help="token maps, caches and the run going on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--seeds", type=int, help="at most so many of the campaign's seeds")
    parser.add_argument("--plot", type=Path, help="an SVG of the report (needs matplotlib)")
    args = parser.parse_args()
    campaign = _load(args.campaign, args.data)
    if args.only:
        chosen = {name: campaign.variants[name] for name in args.only}
        campaign = dataclasses.replace(campaign, variants=chosen)
    if args.seeds is not None:
        fewer = {name: min(args.seeds, n) for name, n in campaign.more_seeds.items()}
        seeds = min(args.seeds, campaign.seeds)
        campaign = dataclasses.replace(campaign, seeds=seeds, more_seeds=fewer)
    if args.action == "report":
        _report(campaign, args.results, args.plot)
        return
    if args.work is None:
        parser.error("--work is needed to run")
    deadline = time.monotonic() + 60 * args.minutes
    for name in campaign.variants:
        while (run := _next(campaign, name, _read(args.results))) is not None:
            if time.monotonic() > deadline:
                return
            record = {**dataclasses.asdict(run), **_train(campaign, run, args.work)}
            record["asked"] = run.asked(campaign)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(
                f"{name}: lr {run.learning_rate:g}, seed {run.seed}: {record['loss']}", flush=True
            )


def _load(path: Path, data: Path) -> Campaign:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["campaign"] = sys.modules[__name__]  # Campaign files import this one.
    spec.loader.exec_module(module)
    return module.campaign(data.absolute())


def _read(path: Path) -> Results:
    lines = path.read_text().splitlines() if path.exists() else []
    records = map(json.loads, lines)
    return {_key(record["asked"]): record for record in records}


def _key(asked: Mapping[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True, default=str)


def _report(campaign: Campaign, path: Path, plot: Path | None) -> None:
    rows = [row for name in campaign.variants if (row := _chosen(campaign, name, path))]
    reports.OF_KIND[campaign.report](rows, campaign.baseline, plot)


def _chosen(campaign: Campaign, name: str, path: Path) -> reports.Chosen | None:
    results = _read(path)
    mine = [r for r in results.values() if r["variant"] == name]
    asked = [_key(Run(name, r["learning_rate"], r["seed"]).asked(campaign)) for r in mine]
    return reports.choose(name, (results[key] for key in asked if key in results))


# ---------------------------------------------------------------- the queue


def _next(campaign: Campaign, variant: str, results: Results) -> Run | None:
    """The next run of a variant; None: all done."""

    def loss(run: Run) -> float | None:
        record = results.get(_key(run.asked(campaign)))
        return None if record is None else reports.loss_of(record)

    for run in _search(campaign, variant, loss):
        if loss(run) is None:
            return run
    return None


def _search(campaign: Campaign, variant: str, loss: Any) -> Iterator[Run]:
    """Runs in order; the caller goes on only when the loss of the last one is known."""

    def at(exponent: int, seed: int = 0) -> Run:
        return Run(variant, campaign.learning_rate * 2.0**exponent, seed)

    best = 0
    yield at(best)
    while True:
        for neighbour in (best + 1, best - 1):
            yield at(neighbour)
        better = min((best - 1, best, best + 1), key=lambda e: loss(at(e)))
        if better == best:
            break
        best = better
    for seed in range(1, campaign.seeds_of(variant)):
        yield at(best, seed)


# ---------------------------------------------------------------- one run


def _train(campaign: Campaign, run: Run, work: Path) -> dict[str, Any]:
    variant = campaign.variants[run.variant]
    overrides = {
        "data.cache_dir": work / "cache",
        "train.eval_every": 0,
        "train.sample_tokens": 0,
        **campaign.paths,
        **campaign.overrides,
        **variant.overrides,
        "optimizer.learning_rate": run.learning_rate,
        "train.seed": run.seed,
        "data.shuffle_seed": run.seed,
    }
    if variant.token_map is not None:
        overrides["model.head.token_map"] = _token_map(campaign, variant.token_map, work)
    workdir = work / "run"
    shutil.rmtree(workdir, ignore_errors=True)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={ROOT / campaign.config}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in overrides.items()),
    ]
    started = time.monotonic()
    with (work / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    steps = [record for record in metrics if "loss" in record]
    if status:
        diverged = "NonFiniteLossError" in (work / "log.txt").read_text()
        if not diverged:
            sys.exit(f"{run}: train.py failed, see {work / 'log.txt'}")
        return {"loss": None, "steps": len(steps)}
    seconds = [b["time"] - a["time"] for a, b in itertools.pairwise(steps[20:])]
    return {
        "loss": metrics[-1]["validation_loss"],
        "train_loss": statistics.fmean(r["loss"] for r in steps[-50:]),
        "curve": [round(statistics.fmean(r["loss"] for r in part), 4) for part in _parts(steps)],
        "steps": len(steps),
        "seconds_per_step": statistics.median(seconds),
        "seconds": time.monotonic() - started,
        "peak_gib": usage.ru_maxrss / 2**20,
        **_sizes(workdir),
        **({"by_length": _by_length(workdir, campaign.lengths)} if campaign.lengths else {}),
        "commit": _commit(),
    }


def _parts(steps: list[Any], number: int = 10) -> Iterator[list[Any]]:
    size = max(len(steps) // number, 1)
    return (steps[i : i + size] for i in range(0, size * (len(steps) // size), size))


def _token_map(campaign: Campaign, name: str, work: Path) -> Path:
    path = work / "maps" / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {**campaign.maps[name], "config": ROOT / campaign.config, "output": path}
        options["config.data.cache_dir"] = work / "cache"
        shared = {**campaign.paths, **campaign.overrides}
        fields = {k: v for k, v in shared.items() if k.startswith(("data.", "model."))}
        options |= {f"config.{field}": value for field, value in fields.items()}
        flags = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([sys.executable, "-m", "vqcx_jax.maps", *flags], check=True, cwd=ROOT)
    return path


def _sizes(workdir: Path) -> dict[str, int]:
    """What the output layer holds: vectors, scalars a token, and bits of codes."""
    import jax

    from vqcx_jax import checkpoint
    from vqcx_jax.config import from_json, schema
    from vqcx_jax.nn import functional
    from vqcx_jax.nn.build import abstract_model

    config = from_json(checkpoint.load_run(*checkpoint.locate(workdir))["config"])
    vocab_size, head = config.model.known_vocab_size(), config.model.head
    _, params, _ = functional.split(abstract_model(config))
    # Scores of codes that are learned are gone when they are.
    head_params = {k: v for k, v in params.get("head", {}).items() if k != "scores"}
    arrays = jax.tree.leaves(head_params)
    scalars = sum(x.size for x in arrays if x.ndim == 1)
    code_bits = 0
    if isinstance(head, schema.VQHead):
        code_bits = vocab_size * head.num_codebooks * math.ceil(math.log2(head.num_codes))
    if isinstance(head, schema.ClassVQHead):
        num_classes, _, _ = head.sizes(vocab_size)
        code_bits = head.num_codebooks * math.ceil(math.log2(head.num_codes))
        code_bits *= vocab_size + num_classes
        code_bits += vocab_size * math.ceil(math.log2(num_classes + 1))
    return {
        "vocab_size": vocab_size,
        "embed_dim": config.model.embed_dim,
        "head_vectors": sum(x.size for x in arrays) - scalars,
        "head_scalars": scalars,
        "code_bits": code_bits,
        "trunk": sum(x.size for x in jax.tree.leaves(params.get("blocks", {}))),
    }


def _by_length(workdir: Path, lengths: Sequence[int]) -> dict[str, list[tuple[float, ...]]]:
    """First and last position, nll and tokens, in rows of each length."""
    from vqcx_jax.evaluation import TrainedModel

    model = TrainedModel.load(workdir)
    found = {}
    for length in lengths:
        parts = model.perplexity("validation", seq_len=length).loss.by_position
        found[str(length)] = [(p.first, p.last, p.loss.nll, p.loss.tokens) for p in parts]
    return found


def _commit() -> str:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return result.stdout.strip()


if __name__ == "__main__":
    main()
