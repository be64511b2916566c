"""Compiles a case in a process of its own, which holds libtpu, and reads its kernels' schedules.

As a script it is that process: its argument is a `Request` in JSON, its last line what the compiler
says of the program.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # As for the scripts that import it.

from schedules import cases, dump, tiles

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        case: of `cases.CASES`. chip: of `cases.TOPOLOGIES`.
        part: "forward" or "backward" pass alone; None: both.
        sizes: block sizes of this part, see `tiles.Tuned`; None: those of the reviewed table.
    """

    case: str
    chip: str
    part: str | None = None
    sizes: tuple[int, ...] | None = None

    def make(self) -> cases.Case:
        """The case with these block sizes, and the kernels of this part."""
        make = cases.CASES[self.case]
        if self.part is None or self.sizes is None:
            return make(self.chip)
        case = make(self.chip, tiles.TUNED[self.case].blocks(self.chip, self.part, self.sizes))
        kernel = case.kernels[tiles.PARTS.index(self.part)]
        return dataclasses.replace(case, kernels=[kernel])


class Compiled(NamedTuple):
    """A kernel, its schedule, and the bytes it moves from and to HBM; None: a run decides them."""

    kernel: cases.Kernel
    schedule: dump.Schedule
    hbm_bytes: float | None


class NotCompiledError(Exception):
    """Why there is no program."""


def compiled(
    request: Request,
) -> tuple[dict[str, float], list[Compiled]]:
    """What the compiler says of the program, and its kernels.

    Raises:
        NotCompiledError: there is no program.
        ValueError: a schedule cannot be read.
    """
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, **_ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}
        command = [sys.executable, __file__, json.dumps(dataclasses.asdict(request))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise NotCompiledError(_reason(done.stderr))
        facts, moved = json.loads(done.stdout.strip().splitlines()[-1])
        return facts, [
            Compiled(kernel, dump.read(Path(directory), kernel.name), _of(kernel.name, moved))
            for kernel in request.make().kernels
        ]


def _of(name: str, moved: dict[str, float | None]) -> float | None:
    """Of the last kernel whose name contains this one."""
    return next((x for full, x in reversed(moved.items()) if name in full), None)


def _reason(stderr: str) -> str:
    """The exception's first line: an exhausted memory's is followed by lists."""
    lines = [line for line in stderr.strip().splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if "Error: " in line[:120]]
    return (errors or lines)[-1][:300]


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    print(json.dumps(cases.compile_for(request.make(), request.chip, request.part)))


if __name__ == "__main__":
    main()
