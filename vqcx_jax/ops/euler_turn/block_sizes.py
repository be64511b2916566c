"""Tiles of the Hopper kernel: the reviewed table, by JAX's device kind.

Chosen by hand on an H100, 16 numbers a thread. With a GPU
    python benchmarks/tune_gpu.py "turn, width 128" --results FILE.jsonl
times others, and prints a line for the table.
"""

from typing import NamedTuple

from vqcx_jax.errors import UserError

# A number for each thread of a block.
_THREADS = 128


class Tile(NamedTuple):
    """How much of a head a block of threads works on.

    Attributes:
        size: numbers of the real half of a tile, positions times planes; a multiple of 128.
        steps: tiles of a block, one after the other.
    """

    size: int
    steps: int


class BlockSizes(NamedTuple):
    """Of both passes."""

    forward: Tile = Tile(2048, 8)
    backward: Tile = Tile(2048, 8)


_TABLE: dict[str, BlockSizes] = {}  # What was timed; other kinds have the defaults.


def block_sizes(device_kind: str) -> BlockSizes:
    """Those for a device."""
    return _TABLE.get(device_kind, BlockSizes())


def check(blocks: BlockSizes) -> None:
    """Raises UserError: what no kernel can be made of."""
    for part, (size, steps) in blocks._asdict().items():
        if size % _THREADS or size < 1:
            raise UserError(f"size={size} of the {part} tile: must be a multiple of {_THREADS}")
        if steps < 1:
            raise UserError(f"steps={steps} of the {part} tile: must be at least 1")
