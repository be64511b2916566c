"""What TPU kernels share that keep weights, and the gradient by them, in vector memory.

A step has a block of positions. What is summed over positions stays where it is for the whole of a
group of blocks; a chip with two cores gives each of them a group.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops import device
from vqcx_jax.ops.tpu import LANES, num_cores, up, vmem_limit

# (positions of a step, those whose logits are held); the first that fits.
TILES = ((1024, 512), (1024, 256), (512, 256), (256, 256), (128, 128))
# Columns of the gradient by weights, which are made at a time; the first that divides their width.
_COLUMNS = (512, 384, 256, LANES)


class Tile(NamedTuple):
    """Attributes: positions of a step; row_block, those whose logits are held; columns."""

    positions: int
    row_block: int
    columns: int


def columns_of(width: int) -> int:
    """Columns of a tile, for weights of a width that is rounded up to lanes."""
    return next(number for number in _COLUMNS if up(width, LANES) % number == 0)


class Groups(NamedTuple):
    """How blocks of positions are dealt out, and the block specs that follow.

    Attributes: number of groups; num_blocks, those of a group; positions of a block.
    """

    number: int
    num_blocks: int
    positions: int

    @classmethod
    def of(cls, num_positions: int, positions: int) -> "Groups":
        """One for each core, or one in all where blocks cannot be dealt out evenly."""
        num_blocks = num_positions // positions
        number = num_cores(device.current().kind)
        number = number if num_blocks % number == 0 else 1
        return cls(number, num_blocks // number, positions)

    def block(self, columns: int) -> pl.BlockSpec:
        """Of (N, columns): the rows of a step."""
        return pl.BlockSpec((self.positions, columns), lambda g, i: (self._index(g, i), 0))

    def block_of_columns(self, rows: int) -> pl.BlockSpec:
        """Of (rows, N): the columns of a step."""
        return pl.BlockSpec((rows, self.positions), lambda g, i: (0, self._index(g, i)))

    def whole(self, *shape: int) -> pl.BlockSpec:
        """Of an array that every step has."""
        return pl.BlockSpec(shape, lambda g, i: (0, 0), pipeline_mode=pl.Buffered(1))

    def of_group(self, *shape: int) -> pl.BlockSpec:
        """Of (groups, *shape): what is summed over the positions of a group."""
        return pl.BlockSpec((None, *shape), lambda g, i: (g, 0, 0), pipeline_mode=pl.Buffered(1))

    def _index(self, group: jax.Array, step: jax.Array) -> jax.Array:
        return group * self.num_blocks + step


def compiler_params() -> pltpu.CompilerParams:
    """For a grid of groups and blocks."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=vmem_limit(device.current().kind),
    )


def dot(x: Any, y: Any, transposed: bool = False) -> jax.Array:
    """X y, or x y^T, accumulated in float32; of float32 operands no part is rounded away.

    The matrix unit would round those to bfloat16.
    """
    return jax.lax.dot_general(
        x,
        y,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
