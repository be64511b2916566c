"""Trains what a campaign lists, one run after the other, and reports what came out.

    python benchmarks/campaign.py run CAMPAIGN.py --data=DIR --work=DIR --results=FILE.jsonl
    python benchmarks/campaign.py report CAMPAIGN.py --data=DIR --results=FILE.jsonl --plot=FILE.svg

CAMPAIGN.py has a function `campaign(data: Path) -> Campaign`, see benchmarks/campaigns/. Every run
is `train.py` in a process of its own and leaves one line of JSON: what was asked for, losses,
sizes, times. A run that has its line is not done again, so the command can be stopped at any time
and goes on where it was. --jobs=N has N runs at a time, which share the machine and its devices.
Variants share everything but what they name; each has its own learning rate, found with seed 0 by
the same search (powers of two from one start, until both neighbours of the best are worse); the
other seeds use that rate.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
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
class ShortRun:
    """A run whose output layer a map is made of, and nothing else.

    Attributes:
        overrides: config field -> value, beside the campaign's: a full head, steps, rate.
    """

    overrides: Mapping[str, object]


@dataclasses.dataclass(frozen=True)
class Campaign:
    """What to train and how.

    Attributes:
        config: the configuration file that all runs share.
        overrides: config field -> value, for all runs.
        paths: config field -> where something lies on this machine; not part of a result.
        variants: by name, in the order in which they are run.
        baseline: the variant that the others are compared with.
        maps: token maps by name: options of `python -m vqcx_jax.maps`; `vectors` may be a
            `ShortRun`, which is trained first.
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
            "map": _plain(campaign.maps[variant.token_map]) if variant.token_map else None,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }


Results = dict[str, dict[str, Any]]  # Key of what was asked -> record.


def _plain(options: Mapping[str, object]) -> dict[str, object]:
    """Options of a map as JSON has them."""
    return {
        name: dataclasses.asdict(value) if isinstance(value, ShortRun) else value
        for name, value in options.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("campaign", type=Path)
    parser.add_argument("--data", type=Path, default=Path(), help="where the campaign's text is")
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--work", type=Path, help="token maps, caches and the run going on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--seeds", type=int, help="at most so many of the campaign's seeds")
    parser.add_argument("--baseline", help="report differences to this variant")
    parser.add_argument("--plot", type=Path, help="an SVG of the report (needs matplotlib)")
    args = parser.parse_args()
    campaign = load(args.campaign, args.data)
    if args.only:
        chosen = {name: campaign.variants[name] for name in args.only}
        campaign = dataclasses.replace(campaign, variants=chosen)
    if args.baseline is not None:
        if args.baseline not in campaign.variants:
            parser.error(f"--baseline={args.baseline!r}: must be one of {list(campaign.variants)}")
        campaign = dataclasses.replace(campaign, baseline=args.baseline)
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
    _run_all(campaign, args.results, args.work, args.jobs, deadline)


def _run_all(campaign: Campaign, path: Path, work: Path, jobs: int, deadline: float) -> None:
    """Runs what has no line yet, `jobs` at a time, and begins with the first variants."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    free = [work / f"run{index}" for index in range(jobs)]
    running: dict[concurrent.futures.Future[dict[str, Any]], tuple[Run, Path]] = {}
    failed: set[Run] = set()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while True:
            begun = failed | {run for run, _ in running.values()}
            results = _read(path)
            ready = (run for name in campaign.variants for run in _ready(campaign, name, results))
            for run in [run for run in ready if run not in begun]:
                if free and time.monotonic() < deadline:
                    directory = free.pop()
                    future = pool.submit(train, campaign, run, work, directory)
                    running[future] = run, directory
            if not running:
                break
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                run, directory = running.pop(future)
                free.append(directory)
                try:
                    record = {**dataclasses.asdict(run), **future.result()}
                except FailedError as error:
                    failed.add(run)
                    print(f"{run}: {error}", flush=True)
                    continue
                record["asked"] = run.asked(campaign)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                rate, loss = run.learning_rate, record["loss"]
                print(f"{run.variant}: lr {rate:g}, seed {run.seed}: {loss}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} of the runs failed, see above")


def load(path: Path, data: Path) -> Campaign:
    """The campaign that a file describes."""
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


def _ready(campaign: Campaign, variant: str, results: Results) -> list[Run]:
    """The next runs of a variant, which need not wait for each other; none: all done."""

    def loss(run: Run) -> float | None:
        record = results.get(_key(run.asked(campaign)))
        return None if record is None else reports.loss_of(record)

    for runs in _search(campaign, variant, loss):
        missing = [run for run in runs if loss(run) is None]
        if missing:
            return missing
    return []


def _search(campaign: Campaign, variant: str, loss: Any) -> Iterator[list[Run]]:
    """Runs in order; the caller goes on only when the losses of the last ones are known."""

    def at(exponent: int, seed: int = 0) -> Run:
        return Run(variant, campaign.learning_rate * 2.0**exponent, seed)

    best = 0
    while True:
        yield [at(best), at(best + 1)]
        if loss(at(best + 1)) < loss(at(best)):
            best += 1
            continue
        yield [at(best - 1)]
        if loss(at(best - 1)) > loss(at(best)):
            break
        best -= 1
    yield [at(best, seed) for seed in range(1, campaign.seeds_of(variant))]


# ---------------------------------------------------------------- one run


class FailedError(Exception):
    """A run has no result; the message says where to look."""


def train(campaign: Campaign, run: Run, work: Path, workdir: Path) -> dict[str, Any]:
    """Runs train.py in `workdir`, which is made anew: what came out, sizes and times."""
    variant = campaign.variants[run.variant]
    overrides = {
        **variant.overrides,
        "optimizer.learning_rate": run.learning_rate,
        "train.seed": run.seed,
        "data.shuffle_seed": run.seed,
    }
    if variant.token_map is not None:
        overrides["model.head.token_map"] = _token_map(campaign, variant.token_map, work)
    started = time.monotonic()
    status, usage = _train(campaign, overrides, work, workdir)
    log_path = workdir.with_suffix(".log")
    if _diverged(status, log_path.read_text()):
        return {"loss": None}
    if status:
        raise FailedError(f"train.py failed, see {log_path}")
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    steps = [record for record in metrics if "loss" in record]
    seconds = [b["time"] - a["time"] for a, b in itertools.pairwise(steps[20:])]
    return {
        "loss": metrics[-1]["validation_loss"],
        "train_loss": statistics.fmean(r["loss"] for r in steps[-50:]),
        "curve": [round(statistics.fmean(r["loss"] for r in part), 4) for part in _parts(steps)],
        "steps": len(steps),
        "seconds_per_step": statistics.median(seconds),
        "seconds": time.monotonic() - started,
        "peak_gib": usage.ru_maxrss / 2**20,
        **_measure(workdir, campaign.lengths, log_path),
        "commit": _commit(),
    }


def _train(
    campaign: Campaign, overrides: Mapping[str, object], work: Path, workdir: Path
) -> tuple[int, resource.struct_rusage]:
    """train.py in a process of its own: how it ended, and what it used."""
    shared: dict[str, object] = {
        "data.cache_dir": work / "cache",
        "train.eval_every": 0,
        "train.sample_tokens": 0,
        **campaign.paths,
        **campaign.overrides,
    }
    shutil.rmtree(workdir, ignore_errors=True)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={ROOT / campaign.config}",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in {**shared, **overrides}.items()),
    ]
    with workdir.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    return status, usage


def _diverged(status: int, log: str) -> bool:
    """Did train.py end as it does when a loss is not finite? A bug has a traceback."""
    return os.waitstatus_to_exitcode(status) == 1 and "Traceback" not in log


def _parts(steps: list[Any], number: int = 10) -> Iterator[list[Any]]:
    size = max(len(steps) // number, 1)
    return (steps[i : i + size] for i in range(0, size * (len(steps) // size), size))


_making = collections.defaultdict[Path, threading.Lock](threading.Lock)


def _token_map(campaign: Campaign, name: str, work: Path) -> Path:
    path = work / "maps" / f"{name}.npz"
    with _making[path]:
        if not path.exists():
            _make_token_map(campaign, name, work, path)
    return path


def _make_token_map(campaign: Campaign, name: str, work: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {**campaign.maps[name], "config": ROOT / campaign.config, "output": path}
    short = options.get("vectors")
    if isinstance(short, ShortRun):
        options["vectors"] = run = path.with_suffix(".run")
        status, _ = _train(campaign, short.overrides, work, run)
        if status:
            raise FailedError(f"train.py failed, see {run.with_suffix('.log')}")
    options["config.data.cache_dir"] = work / "cache"
    shared = {**campaign.paths, **campaign.overrides}
    fields = {k: v for k, v in shared.items() if k.startswith(("data.", "model."))}
    options |= {f"config.{field}": value for field, value in fields.items()}
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "vqcx_jax.maps", *flags]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise FailedError(f"vqcx_jax.maps failed for {path}")


def _measure(workdir: Path, lengths: tuple[int, ...], log_path: Path) -> dict[str, Any]:
    """What `measure_run.py` finds, in a process of its own, as it holds devices."""
    script = str(ROOT / "benchmarks" / "measure_run.py")
    command = [sys.executable, script, str(workdir), *map(str, lengths)]
    with log_path.open("a") as log:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True)
    if result.returncode:
        raise FailedError(f"measure_run.py failed, see {log_path}")
    return json.loads(result.stdout.splitlines()[-1])


def _commit() -> str:
    result = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return result.stdout.strip()


if __name__ == "__main__":
    main()
