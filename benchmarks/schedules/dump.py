"""Reads the final schedule of a TPU kernel from what the compiler dumps.

A schedule is a list of bundles. Loops are branches backwards; what is conditional (`pl.when`) is a
branch forwards over a region. Regions of fewer than `SMALL` bundles, such as the bookkeeping of
copies, count as if they always ran.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SMALL = 60
_DELAY = 5  # Bundles from a branch to where it leaves off, itself among them.

_ADDRESS = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:LB|LH|LE|PB|PF|CT)?\s*:")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_VMEM = re.compile(r"#allocation\d+ \[.*?space=vmem, size = (0x[0-9a-f]+)")
_TRIPS = re.compile(r"totalorder [^,]+, (\d+) /\* loop exit test")


@dataclasses.dataclass(frozen=True)
class Part:
    """Bundles [start, end) and how often they run."""

    start: int
    end: int
    runs: float
    inside: tuple[tuple[int, int], ...] = ()  # Conditional regions, which do not count here.

    def addresses(self) -> list[int]:
        """Those that count."""
        skipped = {a for start, end in self.inside for a in range(start, end)}
        return [a for a in range(self.start, self.end) if a not in skipped]

    def __str__(self) -> str:
        return (
            f"{self.start:#x}-{self.end:#x}: {len(self.addresses()):,} bundles x {self.runs:,.0f}"
        )


class Nested(NamedTuple):
    """How often a region runs, and the conditional ones inside of it."""

    runs: float
    inside: Sequence[float]


Executions = Sequence[float | Nested]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a kernel's loop over its grid is made of.

    Attributes:
        loop: (start, end). trips: of it. regions: conditional ones inside of it.
        nested: conditional regions inside of those.
        units, capacity: names, and how many of each a bundle has. usage: of each bundle.
        inner_loops: (start, end, trips). vmem_bytes: of all that is allocated in vector memory.
    """

    loop: tuple[int, int]
    trips: int
    regions: tuple[tuple[int, int], ...]
    units: tuple[str, ...]
    capacity: tuple[int, ...]
    usage: tuple[tuple[int, ...], ...]
    inner_loops: tuple[tuple[int, int, int], ...] = ()
    vmem_bytes: int = 0
    nested: tuple[tuple[int, int], ...] = ()

    def bundles(self, part: "Part") -> list[tuple[int, int]]:
        """Addresses of a part, and how often each is issued when the part runs once."""
        return [
            (a, math.prod(trips for start, end, trips in self.inner_loops if start <= a < end))
            for a in part.addresses()
        ]

    def length(self, part: "Part") -> int:
        """Cycles of a part that runs once."""
        return sum(times for _, times in self.bundles(part))

    def cycles(self, executions: Executions) -> tuple[float, list[Part]]:
        """Bundles times executions.

        Args:
            executions: of each conditional region, in the order of addresses. Of one that is not
                said to be nested, what is conditional inside of it counts as if it always ran.

        Raises:
            ValueError: there are more or fewer regions.
        """
        _check_number(executions, self.regions)
        parts = [Part(*self.loop, self.trips, self.regions)]
        for region, runs in zip(self.regions, executions, strict=True):
            if not isinstance(runs, Nested):
                parts.append(Part(*region, runs))
                continue
            inside = tuple(r for r in self.nested if _holds(region, r))
            _check_number(runs.inside, inside)
            parts.append(Part(*region, runs.runs, inside))
            parts += [Part(*r, n) for r, n in zip(inside, runs.inside, strict=True)]
        return sum(self.length(part) * part.runs for part in parts), parts

    def busiest(self, parts: Sequence[Part]) -> tuple[str, float]:
        """The unit with the largest share of its slots in use, weighted as the cycles are."""
        weight = dict.fromkeys(range(len(self.usage)), 0.0)
        for part in parts:
            for address, times in self.bundles(part):
                weight[address] += part.runs * times
        total = sum(weight.values())
        used = [
            sum(weight[a] * row[u] for a, row in enumerate(self.usage))
            for u in range(len(self.units))
        ]
        shares = {
            unit: n / (slots * total)
            for unit, n, slots in zip(self.units, used, self.capacity, strict=True)
            if ":" not in unit  # Spills and fills are among the stores and loads.
        }
        unit = max(shares, key=shares.__getitem__)
        return unit, shares[unit]


def read(directory: Path, kernel: str) -> Schedule:
    """The last compiled kernel whose name contains this one.

    Raises:
        ValueError: there is none, or its outermost loop is not found.
    """
    found = [
        f
        for f in sorted(directory.glob(f"*{kernel}*-final_bundles.txt"))
        if "analysis" not in f.name
    ]
    if not found:
        raise ValueError(f"{kernel}: no schedule in the dump")
    starts: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    trips: list[tuple[int, int]] = []
    address = 0
    for line in found[-1].read_text().splitlines():
        if match := _ADDRESS.match(line):
            address = int(match.group(1), 16)
        branches += [(address, target) for target in _BRANCH.findall(line)]
        trips += [(address, int(count)) for count in _TRIPS.findall(line)]
        for region in re.findall(r"Start region (\d+)", line):
            starts.setdefault(region, address)
        for region in re.findall(r"Start/End empty region (\d+)", line):
            starts.setdefault(region, address)
    loops = _loops(found[-1])
    start, _, _ = min(loops)
    end, count = max(trips)
    loop = (start, end)
    regions = [
        (at + _DELAY, starts[target])
        for at, target in branches
        if loop[0] <= at < end and starts.get(target, 0) - at - _DELAY >= SMALL
    ]
    step = max(regions, key=lambda region: region[1] - region[0], default=loop)
    if step[1] - step[0] > (loop[1] - loop[0]) / 2:
        # The pipeline of copies goes two trips further than the steps of the grid.
        loop, count = step, count - 2
        regions = [(a, b) for a, b in regions if step[0] <= a and b <= step[1] and (a, b) != step]
    outermost = _outermost(regions)
    nested = _outermost([r for r in regions if r not in outermost])
    inner = tuple(
        (start, end, times)
        for start, end, times in _loops(found[-1])
        if loop[0] < start and end <= loop[1]
    )
    units, capacity, usage = _usage(directory, kernel)
    vmem = _vmem_bytes(directory, kernel)
    return Schedule(loop, count, outermost, units, capacity, usage, inner, vmem, nested)


def _outermost(regions: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(r for r in regions if not any(_holds(other, r) for other in regions)))


def _check_number(executions: Executions, regions: Sequence[tuple[int, int]]) -> None:
    if len(executions) != len(regions):
        found = ", ".join(f"{b - a} bundles at {a:#x}" for a, b in regions)
        raise ValueError(f"{len(executions)} executions for {len(regions)} regions: {found}")


def _holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]


def _loops(path: Path) -> list[tuple[int, int, int]]:
    """All loops: (start, end, trips), the inner ones of nested loops first."""
    address, headers, tests = 0, [], []
    starts: dict[str, int] = {}
    ends: dict[int, int] = {}
    for line in path.read_text().splitlines():
        if match := _ADDRESS.match(line):
            address = int(match.group(1), 16)
        if re.match(r"\s*0x[0-9a-f]+ LB", line):
            headers.append(address)
        tests += [(headers.pop(), address, int(n)) for n in _TRIPS.findall(line) if headers]
        for kind, region in re.findall(r"(Start|End) region (\d+)", line):
            if kind == "Start":
                starts[region] = address
            elif region in starts:
                start = starts[region]
                ends[start] = max(address, ends.get(start, 0))
    if not tests:
        raise ValueError(f"{path.name}: no loop")
    # The test of a loop may come early in its body, which is a region that begins at its header.
    return [(start, max(test, ends.get(start, 0)) + 1, trips) for start, test, trips in tests]


def _vmem_bytes(directory: Path, kernel: str) -> int:
    path = sorted(directory.glob(f"*{kernel}*-pre-finalize-registers-and-allocations.txt"))[-1]
    return sum(int(size, 16) for size in _VMEM.findall(path.read_text()))


def _usage(
    directory: Path, kernel: str
) -> tuple[tuple[str, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    path = sorted(directory.glob(f"*{kernel}*-final_hlo-static-per-bundle-utilization.txt"))[-1]
    lines = path.read_text().splitlines()
    units = tuple(unit.strip() for unit in lines[1].split(","))
    rows = [tuple(map(int, line.split())) for line in lines[4:] if line.strip()]
    return units, tuple(map(int, lines[2].split())), tuple(rows)
