"""Compiles the TPU kernels for chips that are not here, and reads the compiler's final schedules.

    python benchmarks/tpu_schedule.py --chips v5p v6e [--only NAME ...] [--regions]

A schedule is static: a bundle is issued in each cycle unless the core waits for memory, so bundles
of a loop body times its trips are the cycles of a kernel that never waits. That is what is printed,
with the unit that is busiest; it is no measurement. "Least" are the cycles of products alone at the
chip's peak bfloat16 rate, or of the bytes that the kernel's blocks move, whichever are more.
Vector memory is what the kernel allocates, without operands that XLA has put there before.
Needs libtpu, which only one process at a time may use; the peers need tokamax (`pip install -e
'.[test]' tokamax`, Python 3.12).
"""

import argparse

from schedules import cases, compiler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"], choices=cases.TOPOLOGIES)
    parser.add_argument("--only", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    parser.add_argument("--regions", action="store_true", help="print what the cycles are made of")
    args = parser.parse_args()
    print(
        f"{'chip':5} {'case':28} {'kernel':34} {'bundles':>8} {'cycles':>12} {'ms':>7} "
        f"{'least':>10} {'VMEM, MB':>8} {'HBM, MB':>8}  busiest"
    )
    for chip in args.chips:
        for name in args.only:
            _report(name, chip, args.regions)


def _report(name: str, chip: str, with_regions: bool) -> None:
    try:
        facts, kernels = compiler.compiled(compiler.Request(name, chip))
    except compiler.NotCompiledError as error:
        print(f"{chip:5} {name:28} does not compile: {error}")
        return
    total = 0.0
    for kernel, schedule, moved in kernels:
        cycles, parts = kernel.cycles(schedule)
        total += cycles
        unit, share = schedule.busiest(parts)
        hbm = least = "?"  # Where a run decides what is moved.
        if moved is not None:
            hbm, least = f"{moved / 1e6:.0f}", f"{kernel.least_cycles(chip, moved):,.0f}"
        print(
            f"{chip:5} {name:28} {kernel.name:34} {len(schedule.usage):8,} {cycles:12,.0f} "
            f"{1e3 * cycles / cases.CLOCK[chip]:7.3f} "
            f"{least:>10} "
            f"{schedule.vmem_bytes / 1e6:8.1f} {hbm:>8}  {unit} {share:.0%}"
        )
        if with_regions:
            for part in parts:
                length = schedule.length(part)
                print(f"      {part.start:#x}: {length:,} cycles x {part.runs:,.0f}")
    said = ", ".join(f"{key} {value:.2f}" for key, value in facts.items())
    start = f"{chip:5} {name:28} {'together':34} {'':8}"
    print(f"{start} {total:12,.0f} {1e3 * total / cases.CLOCK[chip]:7.3f}  {said}")


if __name__ == "__main__":
    main()
