"""Tiles of the Hopper kernel: the reviewed table, by JAX's device kind.

Chosen by hand, for what fits registers and shared memory; no GPU was at hand to time others. With
one,
    python benchmarks/tune_gpu.py "log_z 16x16" --results FILE.jsonl
does so, and prints a line for the table.
"""

from typing import NamedTuple

from vqcx_jax.errors import UserError

# Of a row of a tile as it lies in shared memory, and of what is multiplied at a time.
_LANES, _MOST_TOKENS = 64, 256


class Tile(NamedTuple):
    """How much of the codes a block of threads works on at a time.

    Attributes:
        tokens: a multiple of 64 up to 256.
        stages: tiles that are in shared memory at a time, at least 2: one is fetched meanwhile.
    """

    tokens: int
    stages: int


class BlockSizes(NamedTuple):
    """The backward pass also holds the gradient of 64 positions in registers."""

    forward: Tile = Tile(128, 2)
    backward: Tile = Tile(64, 2)


_TABLE: dict[str, BlockSizes] = {}  # What was timed; other kinds have the defaults.


def block_sizes(device_kind: str) -> BlockSizes:
    """Those for a device."""
    return _TABLE.get(device_kind, BlockSizes())


def check(blocks: BlockSizes) -> None:
    """Raises UserError: what no kernel can be made of."""
    for part, (tokens, stages) in blocks._asdict().items():
        if tokens % _LANES or not 0 < tokens <= _MOST_TOKENS:
            accepted = f"must be a multiple of {_LANES} up to {_MOST_TOKENS}"
            raise UserError(f"tokens={tokens} of the {part} tile: {accepted}")
        if stages < 2:
            raise UserError(f"stages={stages} of the {part} tile: must be at least 2")
