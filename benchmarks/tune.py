"""Compiles a kernel with one tile after the other and ranks them by their schedules.

    python benchmarks/tune.py CASE --chips v5p v6e --results FILE.jsonl [--minutes N]

For each chip and for the forward and the backward pass alone: candidates (schedules/tiles.py) in
the order of how far they are from the reviewed table's, each compiled for a chip that need not be
here. A schedule is what a core does that never waits for memory, no measurement. Every candidate
leaves one line of JSON and is not compiled again, so the command can be stopped at any time and
goes on where it was: begin a new file when a kernel has changed. Nothing is written into the
package: the last line of each table is for block_sizes.py, once somebody has looked at it. Needs
libtpu, which only one process at a time may use.
"""

import argparse
import dataclasses
import importlib.metadata
import math
import time
from pathlib import Path

from records import Record, Records, append, key, read
from schedules import cases, compiler, tiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=tiles.TUNED)
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"], choices=cases.TOPOLOGIES)
    parser.add_argument("--parts", nargs="+", default=tiles.PARTS, choices=tiles.PARTS)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after this")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    wanted = [(chip, part) for chip in args.chips for part in args.parts]
    for chip, part in wanted:
        for request in missing(args.case, chip, part, read(args.results)):
            if time.monotonic() >= deadline:
                break
            record = {"asked": asked(request), **_try(request)}
            append(args.results, record)
    for chip, part in wanted:
        print("\n".join(table(args.case, chip, part, read(args.results))), end="\n\n")


def requests(case: str, chip: str, part: str) -> list[compiler.Request]:
    """All candidates."""
    sizes = tiles.TUNED[case].candidates(chip, part)
    return [compiler.Request(case, chip, part, s) for s in sizes]


def missing(case: str, chip: str, part: str, records: Records) -> list[compiler.Request]:
    """Candidates that were not compiled yet."""
    return [r for r in requests(case, chip, part) if key(asked(r)) not in records]


def asked(request: compiler.Request) -> Record:
    """Everything that decides what comes out, but for the kernel's own code."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return {**dataclasses.asdict(request), **versions}


def _try(request: compiler.Request) -> Record:
    try:
        _, [(kernel, schedule, _)] = compiler.compiled(request)
        cycles, parts = kernel.cycles(schedule)
    except compiler.NotCompiledError as error:
        return {"cycles": None, "why": f"does not compile: {error}"}
    except ValueError as error:
        return {"cycles": None, "why": f"schedule not understood: {error}"}
    unit, share = schedule.busiest(parts)
    return {"cycles": cycles, "bundles": len(schedule.usage), "unit": unit, "share": share}


def table(case: str, chip: str, part: str, records: Records) -> list[str]:
    """Lines for people, best first, and at the end one for the reviewed table."""
    tuned, today = tiles.TUNED[case], tiles.TUNED[case].today(chip, part)
    found = {r.sizes: records.get(key(asked(r))) for r in requests(case, chip, part)}
    tried = {sizes: record for sizes, record in found.items() if record is not None}
    ranked = sorted(tried, key=lambda sizes: tried[sizes]["cycles"] or math.inf)
    lines = [
        f"{case}, {part}, {chip}: {len(tried)} of {len(found)} candidates",
        f"{', '.join(tuned.names):32} {'cycles':>12} {'of today':>9} {'bundles':>8}  busiest",
    ]
    of_today = tried.get(today, {}).get("cycles")
    for sizes in ranked:
        record, cycles = tried[sizes], tried[sizes]["cycles"]
        name = ", ".join(map(str, sizes)) + (" (today)" if sizes == today else "")
        if cycles is None:
            lines.append(f"{name:32} {record['why']}")
            continue
        ratio = f"{cycles / of_today:9.3f}" if of_today else f"{'?':>9}"
        busiest = f"{record['unit']} {record['share']:.0%}"
        lines.append(f"{name:32} {cycles:12,.0f} {ratio} {record['bundles']:8,}  {busiest}")
    if ranked and tried[ranked[0]]["cycles"] is not None:
        lines.append(f'"{cases.KINDS[chip]}": {ranked[0]},  # {part}')
    return lines


if __name__ == "__main__":
    main()
