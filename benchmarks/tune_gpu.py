"""Times a Hopper kernel with one tile after the other, each beside the one of the reviewed table.

    python benchmarks/tune_gpu.py CASE --results FILE.jsonl [--repeats 7] [--minutes N]

For the forward and the backward pass: a candidate and today's tile are timed in turns, so that a
drift of the machine hits both; what counts is the median of their ratios. With another backward
tile both passes are timed, the forward one as it is. Every candidate leaves one line of JSON and is
not timed again on this kind of GPU beside the same tile, so the command can be stopped at any time
and goes on where it was: begin a new file when a kernel has changed. Nothing is written into the
package: the last line of each table is for `gpu_block_sizes.py` (loss) or `block_sizes.py` (turn),
once somebody has looked at it. For TPUs, which need not be here, there is `benchmarks/tune.py`.
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from candidates import Sizes, nearest_first
from records import Record, Records, append, key, read
from timing import Step, compile_step, measure

from vqcx_jax.errors import UserError
from vqcx_jax.ops import attention, device, dispatch, gpu
from vqcx_jax.ops.codebook.streaming import gpu_block_sizes as loss_blocks
from vqcx_jax.ops.codebook.streaming import mosaic_gpu as loss_kernel
from vqcx_jax.ops.euler_turn import block_sizes as turn_blocks
from vqcx_jax.ops.euler_turn import mosaic_gpu as turn_kernel

PARTS = ("forward", "backward")


class Tuned(NamedTuple):
    """A kernel at one shape.

    Attributes:
        blocks: the module of its tables.
        candidates: for the tile of either pass.
        step: block sizes, whether the backward pass runs, too -> a compiled step.
    """

    blocks: Any
    candidates: list[Sizes]
    step: Callable[[Any, bool], Step]

    def today(self) -> Any:
        """Block sizes of the reviewed table for this device."""
        return self.blocks.block_sizes(device.current().kind)

    def compile(self, part: str, sizes: Sizes) -> Step:
        """With this tile for a part, and today's for the other one."""
        blocks = self.today()._replace(**{part: self.blocks.Tile(*sizes)})
        return self.step(blocks, part == "backward")


def _loss(num_positions: int, vocab_size: int, num_codes: tuple[int, ...]) -> Tuned:
    """Log Z of so many codebooks, with bias and scale; gradients by all of them."""

    def step(blocks: loss_blocks.BlockSizes, has_backward: bool) -> Step:
        rng = np.random.default_rng(0)
        logits = [rng.standard_normal((num_positions, k), np.float32) for k in num_codes]
        codes = np.stack([rng.integers(k, size=vocab_size) for k in num_codes], axis=1)
        bias, scale, weight = (
            rng.standard_normal(n, np.float32) for n in (vocab_size, vocab_size, num_positions)
        )

        def loss(logits: Any, bias: jax.Array, scale: jax.Array, codes: jax.Array) -> jax.Array:
            arrays = (logits, codes, bias, scale)
            log_z_N = loss_kernel.log_z(*arrays, product_dtype="bfloat16", blocks=blocks)
            return jnp.sum(weight * log_z_N)

        arrays = (tuple(map(jnp.asarray, logits)), *map(jnp.asarray, (bias, scale, codes)))
        function = jax.value_and_grad(loss, (0, 1, 2)) if has_backward else loss
        return compile_step(function, *arrays)

    return Tuned(loss_blocks, list(itertools.product((64, 128, 192, 256), (2, 3, 4))), step)


def _turn(length: int, num_heads: int, head_dim: int) -> Tuned:
    """Queries and keys of one row, bfloat16; gradients by them, delta and bias."""

    def step(blocks: turn_blocks.BlockSizes, has_backward: bool) -> Step:
        rng = np.random.default_rng(0)
        shape, planes = (1, length, num_heads, head_dim), (num_heads, head_dim // 2)
        q, k, d_q, d_k = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(4))
        delta, bias = (jnp.asarray(rng.standard_normal(planes), jnp.float32) for _ in range(2))
        positions = jnp.arange(length)[None]
        table = attention.rotary_table(positions, attention.rope_frequencies(head_dim))

        def turned(q: jax.Array, k: jax.Array, delta: jax.Array, bias: jax.Array) -> Any:
            return turn_kernel.queries_and_keys(q, k, *table, delta, bias, blocks=blocks)

        def with_gradients(*arrays: jax.Array) -> Any:
            result, pull_back = jax.vjp(turned, *arrays)
            return result, pull_back((d_q, d_k))

        return compile_step(with_gradients if has_backward else turned, q, k, delta, bias)

    return Tuned(turn_blocks, list(itertools.product((1024, 2048, 4096), (4, 8, 16))), step)


CASES: dict[str, Tuned] = {
    "log_z 16x16": _loss(8192, 128_256, (16,) * 16),
    "log_z 4x32": _loss(8192, 128_256, (32,) * 4),
    "turn, width 64": _turn(8192, 16, 64),
    "turn, width 128": _turn(8192, 16, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after this")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats}: must be at least 1")
    try:
        gpu.require_hopper()
    except dispatch.NotSupported as error:
        parser.error(str(error))
    deadline = time.monotonic() + 60 * args.minutes
    for part in args.parts:
        for sizes in missing(args.case, part, read(args.results)):
            if time.monotonic() >= deadline:
                break
            found = time_beside_today(CASES[args.case], part, sizes, args.repeats)
            append(args.results, {"asked": asked(args.case, part, sizes), **found})
    for part in args.parts:
        print("\n".join(table(args.case, part, read(args.results))), end="\n\n")


def asked(case: str, part: str, sizes: Sizes) -> Record:
    """Everything that decides a ratio, but for the kernel's own code."""
    return {
        "case": case,
        "part": part,
        "sizes": list(sizes),
        "today": CASES[case].today()._asdict(),
        "kind": device.current().kind,
        "jax": jax.__version__,
    }


def ordered(tuned: Tuned, part: str) -> list[Sizes]:
    """Candidates but for today's, those first that differ least from it."""
    today = tuple(getattr(tuned.today(), part))
    return nearest_first((sizes for sizes in tuned.candidates if sizes != today), today)


def missing(case: str, part: str, records: Records) -> Iterator[Sizes]:
    """Candidates that were not timed yet."""
    wanted = ordered(CASES[case], part)
    return (sizes for sizes in wanted if key(asked(case, part, sizes)) not in records)


def time_beside_today(tuned: Tuned, part: str, sizes: Sizes, repeats: int) -> Record:
    """Milliseconds of both in each repetition, or why there are none."""
    today = tuple(getattr(tuned.today(), part))
    try:
        rows = {
            name: tuned.compile(part, tile)
            for name, tile in (("candidate", sizes), ("today", today))
        }
    except (UserError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        first_line, _, _ = str(error).partition("\n")
        return {"why": f"does not compile: {first_line}"}
    measure(rows, repeats)
    times = {name: [1e3 * s for s in row.seconds] for name, row in rows.items()}
    return {"ms": times["candidate"], "ms_of_today": times["today"]}


def table(case: str, part: str, records: Records) -> list[str]:
    """Lines for people, best first, and at the end one for the reviewed table."""
    tuned, kind = CASES[case], device.current().kind
    today = tuple(getattr(tuned.today(), part))
    found = [(s, records.get(key(asked(case, part, s)))) for s in ordered(tuned, part)]
    tried = [(sizes, record) for sizes, record in found if record is not None]
    timed = sorted((*_ratios(record), sizes) for sizes, record in tried if "ms" in record)
    lines = [
        f"{case}, {part}, {kind}: {len(tried)} of {len(found)} candidates; "
        f"{', '.join(tuned.blocks.Tile._fields)}: {_name(today)} today"
    ]
    for median, low, high, sizes in timed:
        lines.append(f"{_name(sizes):12} {median:.3f} [{low:.3f} - {high:.3f}] of today's time")
    lines += [f"{_name(sizes):12} {record['why']}" for sizes, record in tried if "why" in record]
    # Only what was faster in every repetition.
    better = next((sizes for _, _, high, sizes in timed if high < 1), today)
    lines.append(f'"{kind}": {better},  # {part}')
    return lines


def _name(sizes: Sizes) -> str:
    return ", ".join(map(str, sizes))


def _ratios(record: Record) -> tuple[float, float, float]:
    """Median, least and most of time over today's."""
    ratios = [a / b for a, b in zip(record["ms"], record["ms_of_today"], strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


if __name__ == "__main__":
    main()
