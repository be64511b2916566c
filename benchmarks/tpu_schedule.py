"""Compiles the TPU kernels for chips that are not here, and reads the compiler's final schedules.

    python benchmarks/tpu_schedule.py --chips v5p v6e [--only NAME ...] [--regions]

A schedule is static: a bundle is issued in each cycle unless the core waits for memory, so bundles
of a loop body times its trips are the cycles of a kernel that never waits. That is what is printed,
with the unit that is busiest; it is no measurement. Needs libtpu; the peers need tokamax
(`pip install -e '.[test]' tokamax`, Python 3.12). Only one process at a time may use libtpu.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from schedules import cases, dump

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", default=["v5p", "v6e"], choices=cases.TOPOLOGIES)
    parser.add_argument("--only", nargs="+", default=list(cases.CASES), choices=cases.CASES)
    parser.add_argument("--regions", action="store_true", help="print what the cycles are made of")
    parser.add_argument("--compile", metavar="CHIP", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile is not None:  # The process that holds libtpu, started below.
        print(json.dumps(cases.compile_for(args.only[0], args.compile)))
        return
    print(f"{'chip':5} {'case':28} {'kernel':34} {'bundles':>8} {'cycles':>12} {'ms':>7}  busiest")
    for chip in args.chips:
        for name in args.only:
            _report(name, chip, args.regions)


def _report(name: str, chip: str, with_regions: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, __file__, "--compile", chip, "--only", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{chip:5} {name:28} does not compile: {last}")
            return
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        total = 0.0
        for kernel in cases.CASES[name].kernels:
            schedule = dump.read(Path(directory), kernel.name)
            cycles, parts = schedule.cycles(kernel.executions[chip])
            total += cycles
            unit, share = schedule.busiest(parts)
            print(
                f"{chip:5} {name:28} {kernel.name:34} {len(schedule.usage):8,} {cycles:12,.0f} "
                f"{1e3 * cycles / cases.CLOCK[chip]:7.3f}  {unit} {share:.0%}"
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
