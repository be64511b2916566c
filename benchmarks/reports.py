"""Tables and plots of a campaign's results, for benchmarks/campaign.py."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The runs of a variant at its best learning rate, by seed."""

    name: str
    learning_rate: float
    records: dict[int, dict[str, Any]]

    @property
    def losses(self) -> dict[int, float]:
        """Validation losses by seed; infinite for a run that diverged."""
        return {seed: loss_of(record) for seed, record in self.records.items()}

    @property
    def perplexities(self) -> list[float]:
        """Of all seeds."""
        return [math.exp(loss) for loss in self.losses.values()]

    @property
    def first(self) -> dict[str, Any]:
        """The run of seed 0."""
        return self.records[0]

    def median(self, field: str) -> float:
        """Of a number of every record."""
        return statistics.median(record[field] for record in self.records.values())


def loss_of(record: dict[str, Any]) -> float:
    """Validation loss; infinite for a run that diverged."""
    return math.inf if record["loss"] is None else record["loss"]


def choose(name: str, records: Iterable[dict[str, Any]]) -> Chosen | None:
    """Of all runs of a variant; None without a run of seed 0 that ended well."""
    records = list(records)
    first = [r for r in records if r["seed"] == 0 and r["loss"] is not None]
    if not first:
        return None
    rate = min(first, key=loss_of)["learning_rate"]
    of_rate = {r["seed"]: r for r in records if r["learning_rate"] == rate}
    return Chosen(name, rate, dict(sorted(of_rate.items())))


def mean(values: Iterable[float], digits: int) -> str:
    """With the standard error, where there are several."""
    values = list(values)
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def paired(row: Chosen, base: Chosen | None) -> list[float]:
    """Losses less those of the baseline with the same seed."""
    if base is None:
        return []
    return [loss - base.losses[seed] for seed, loss in row.losses.items() if seed in base.losses]


def print_losses(rows: Sequence[Chosen]) -> None:
    """All of them, for whoever wants another statistic."""
    print("\nValidation losses, by seed:")
    for row in rows:
        print(f"- {row.name}:", ", ".join(f"{loss:.4f}" for loss in row.losses.values()))


# ---------------------------------------------------------------- output layers


def heads(rows: Sequence[Chosen], baseline: str, plot: Path | None) -> None:
    """Perplexity against the size of the output layer."""
    base = next((row for row in rows if row.name == baseline), None)
    print(
        "| head | vectors / V D | with scalars | bits a token | bytes | lr | seeds | perplexity "
        "| ratio | step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        run = row.first
        full = run["vocab_size"] * run["embed_dim"]
        trained = run["head_vectors"] + run["head_scalars"]
        size = (2 * trained + run["code_bits"] / 8) / (2 * full)
        step = row.median("seconds_per_step")
        print(
            f"| {row.name} | {run['head_vectors'] / full:.2%} | {trained / full:.2%} "
            f"| {run['code_bits'] / run['vocab_size']:.0f} | {size:.1%} "
            f"| {row.learning_rate:g} | {len(row.losses)} | {mean(row.perplexities, 1)} "
            f"| {mean(map(math.exp, paired(row, base)), 3)} "
            f"| {step / base.median('seconds_per_step') if base else math.nan:.2f} |"
        )
    print_losses(rows)
    if plot is not None:
        _plot_heads(rows, baseline, plot)


def _plot_heads(rows: Sequence[Chosen], baseline: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        run, perplexities = row.first, row.perplexities
        trained = run["head_vectors"] + run["head_scalars"]
        x, y = trained / (run["vocab_size"] * run["embed_dim"]), statistics.fmean(perplexities)
        spread = [[y - min(perplexities)], [max(perplexities) - y]]
        axes.errorbar([x], [y], yerr=spread, fmt="o", capsize=3)
        axes.annotate(row.name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
        if row.name == baseline:
            axes.axhline(y, color="gray", linewidth=0.7)
            axes.axhline(1.04 * y, color="gray", linewidth=0.7, linestyle="dashed")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("trained numbers of the output layer / V D (vectors, biases, scales)")
    axes.set_ylabel("validation perplexity (bars: lowest and highest seed)")
    figure.tight_layout()
    figure.savefig(path)


# ---------------------------------------------------------------- attention


def attention(rows: Sequence[Chosen], baseline: str, plot: Path | None) -> None:
    """Perplexity, tested against the baseline with the same seeds, and by position."""
    base = next((row for row in rows if row.name == baseline), None)
    print("| attention | lr | seeds | perplexity | loss less the baseline's | paired t-test, p |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        differences = paired(row, base) if row.name != baseline else []
        print(
            f"| {row.name} | {row.learning_rate:g} | {len(row.losses)} "
            f"| {mean(row.perplexities, 2)} | {mean(differences, 4)} | {_p_value(differences)} |"
        )
    print_losses(rows)
    _print_positions(rows)
    if plot is not None:
        _plot_positions(rows, plot)


def _p_value(differences: Sequence[float]) -> str:
    """Two-sided, of differences with a mean of zero."""
    if len(differences) < 3:
        return ""
    from scipy import stats

    return f"{stats.ttest_1samp(differences, 0.0).pvalue:.3f}"


def _positions(row: Chosen, length: str) -> dict[tuple[int, int], list[float]]:
    """Perplexities of all seeds, by first and last position."""
    found: dict[tuple[int, int], list[float]] = {}
    for record in row.records.values():
        for first, last, nll, tokens in record["by_length"][length]:
            found.setdefault((first, last), []).append(math.exp(nll / tokens))
    return found


def _print_positions(rows: Sequence[Chosen]) -> None:
    for length in rows[0].first["by_length"]:
        buckets = list(_positions(rows[0], length))[-4:]
        names = [f"{first} to {last}" for first, last in buckets]
        print(f"\n| rows of {length}, by position | {' | '.join(names)} |")
        print("|---|" + "---|" * len(names))
        for row in rows:
            found = _positions(row, length)
            print(f"| {row.name} | {' | '.join(mean(found[b], 2) for b in buckets)} |")


def _plot_positions(rows: Sequence[Chosen], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    longest = max(rows[0].first["by_length"], key=int)
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        found = _positions(row, longest)
        x = [(first + last + 1) / 2 for first, last in found]
        axes.plot(x, [statistics.fmean(y) for y in found.values()], marker="o", label=row.name)
    axes.set(xscale="log", yscale="log", xlabel="position in the document")
    axes.set_ylabel(f"validation perplexity, rows of {longest}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


OF_KIND: dict[str, Callable[[Sequence[Chosen], str, Path | None], None]] = {
    "heads": heads,
    "attention": attention,
}
