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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
    """

    config: str
    overrides: Mapping[str, object]
    variants: Mapping[str, Variant]
    baseline: str
    paths: Mapping[str, object] = dataclasses.field(default_factory=dict)
    maps: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    learning_rate: float = 4e-3
    seeds: int = 3


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
    parser.add_argument("--data", type=Path, required=True, help="where the campaign's text is")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--work", type=Path, help="token maps, caches and the run going on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--seeds", type=int, help="at most so many of the campaign's seeds")
    parser.add_argument("--plot", type=Path, help="perplexity against size (needs matplotlib)")
    args = parser.parse_args()
    campaign = _load(args.campaign, args.data)
    if args.only:
        chosen = {name: campaign.variants[name] for name in args.only}
        campaign = dataclasses.replace(campaign, variants=chosen)
    if args.seeds is not None:
        campaign = dataclasses.replace(campaign, seeds=min(args.seeds, campaign.seeds))
    if args.action == "report":
        _report(campaign, _read(args.results), args.plot)
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


def _loss(record: Mapping[str, Any]) -> float:
    """Validation loss; infinite for a run that diverged."""
    return math.inf if record["loss"] is None else record["loss"]


def _key(asked: Mapping[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True, default=str)


# ---------------------------------------------------------------- the queue


def _next(campaign: Campaign, variant: str, results: Results) -> Run | None:
    """The next run of a variant; None: all done."""

    def loss(run: Run) -> float | None:
        record = results.get(_key(run.asked(campaign)))
        return None if record is None else _loss(record)

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
    for seed in range(1, campaign.seeds):
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


def _commit() -> str:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return result.stdout.strip()


# ---------------------------------------------------------------- the report


def _report(campaign: Campaign, results: Results, plot: Path | None) -> None:
    rows = [row for name in campaign.variants if (row := _row(campaign, name, results))]
    losses = {row["name"]: row["losses"] for row in rows}
    base = losses.get(campaign.baseline, {})
    base_seconds = next((r["s_step"] for r in rows if r["name"] == campaign.baseline), math.nan)
    print(
        "| head | vectors / V D | with scalars | bytes | lr | seeds | perplexity | ratio | step |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        paired = [math.exp(row["losses"][s] - base[s]) for s in row["losses"] if s in base]
        print(
            f"| {row['name']} | {row['share']:.2%} | {row['share_scalars']:.2%} "
            f"| {row['bytes']:.1%} | {row['lr']:g} | {len(row['losses'])} "
            f"| {_mean(map(math.exp, row['losses'].values()), 1)} | {_mean(paired, 3)} "
            f"| {row['s_step'] / base_seconds:.2f} |"
        )
    print("\nValidation losses, by seed:")
    for row in rows:
        print(f"- {row['name']}:", ", ".join(f"{loss:.4f}" for loss in row["losses"].values()))
    if plot is not None:
        _plot(campaign, rows, plot)


def _row(campaign: Campaign, name: str, results: Results) -> dict[str, Any] | None:
    """A variant at its best learning rate; None if nothing has been run."""
    mine = [r for r in results.values() if r["variant"] == name]
    asked = [_key(Run(name, r["learning_rate"], r["seed"]).asked(campaign)) for r in mine]
    mine = [r for r, key in zip(mine, asked, strict=True) if key in results]
    first = [r for r in mine if r["seed"] == 0 and r["loss"] is not None]
    if not first:
        return None
    best = min(first, key=lambda r: r["loss"])
    chosen = sorted(
        (r for r in mine if r["learning_rate"] == best["learning_rate"]), key=lambda r: r["seed"]
    )
    full = best["vocab_size"] * best["embed_dim"]
    scalars_and_vectors = best["head_vectors"] + best["head_scalars"]
    return {
        "name": name,
        "lr": best["learning_rate"],
        "losses": {r["seed"]: _loss(r) for r in chosen},
        "share": best["head_vectors"] / full,
        "share_scalars": scalars_and_vectors / full,
        "bytes": (2 * scalars_and_vectors + best["code_bits"] / 8) / (2 * full),
        "s_step": statistics.median(r["seconds_per_step"] for r in chosen),
    }


def _mean(values: Any, digits: int) -> str:
    values = list(values)
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def _plot(campaign: Campaign, rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        perplexities = [math.exp(loss) for loss in row["losses"].values()]
        x, y = row["share_scalars"], statistics.fmean(perplexities)
        spread = [[y - min(perplexities)], [max(perplexities) - y]]
        axes.errorbar([x], [y], yerr=spread, fmt="o", capsize=3)
        axes.annotate(row["name"], (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
        if row["name"] == campaign.baseline:
            axes.axhline(y, color="gray", linewidth=0.7)
            axes.axhline(1.04 * y, color="gray", linewidth=0.7, linestyle="dashed")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("trained numbers of the output layer / V D (vectors, biases, scales)")
    axes.set_ylabel("validation perplexity (bars: lowest and highest seed)")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
