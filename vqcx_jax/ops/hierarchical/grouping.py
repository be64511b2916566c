"""Positions sorted by the weights they need, in blocks that need only one of them.

A batch of products, each of some positions and one group of weights, then takes the place of a
gather of weights for each position. Shapes are fixed: whatever the groups' sizes, N positions fill
at most `num_blocks` blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """Where positions lie in blocks.

    Attributes:
        slot: int32 (N,), distinct, in [0, num_blocks * block_size).
        group: int32 (num_blocks,), of each block.
    """

    slot: jax.Array
    group: jax.Array


def block_size(num_positions: int, num_groups: int) -> int:
    """Positions in a block: those that a group has on average, which bounds the waste at half."""
    return max(1, -(-num_positions // num_groups))


def make_blocks(group_N: jax.Array, num_groups: int, size: int) -> Blocks:
    """Places positions of a group side by side, each group at the start of a block.

    Args:
        group_N: int (N,), values in [0, num_groups).
        size: positions in a block.
    """
    n = group_N.shape[0]
    # sum_g ceil(n_g / size) of at most min(n, G) groups that are not empty.
    num_blocks = (n + min(n, num_groups) * (size - 1)) // size
    count_G = jnp.bincount(group_N, length=num_groups)
    blocks_G = -(-count_G // size)
    first_slot_G = size * (jnp.cumsum(blocks_G) - blocks_G)
    first_sorted_G = jnp.cumsum(count_G) - count_G
    order_N = jnp.argsort(group_N, stable=True)
    sorted_N = group_N[order_N]
    slot_N = first_slot_G[sorted_N] + jnp.arange(n) - first_sorted_G[sorted_N]
    ends_G = jnp.cumsum(blocks_G)
    group = jnp.searchsorted(ends_G, jnp.arange(num_blocks), side="right")
    return Blocks(
        slot=jnp.zeros_like(group_N).at[order_N].set(slot_N.astype(group_N.dtype)),
        group=jnp.minimum(group, num_groups - 1),  # Blocks past the last group are empty.
    )
