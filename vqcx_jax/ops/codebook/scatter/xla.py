"""In plain JAX: the formula, and on CPUs, where gathers of many codebooks take long, by blocks."""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vqcx_jax.ops import device
from vqcx_jax.ops import soft_cap as cap
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.codebook.token_blocks import (
    Blocks,
    block_logits,
    position_blocks,
    sums,
    token_blocks,
    transposed,
)

# Of fewer positions a row is too short to be gathered whole; with three codebooks the formula takes
# 0.8 of the time of blocks, with 16 twice and with 64 four times it.
_POSITIONS, _CODEBOOKS = 8, 8


def logits(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    dtype: DTypeLike = "float32",
) -> jax.Array:
    """See `api.logits`. Gathers, whose transposes are scatters by code."""
    are_many = math.prod(code_logits[0].shape[:-1]) >= _POSITIONS and len(code_logits) >= _CODEBOOKS
    if are_many and device.current().platform == "cpu":
        return _by_blocks(code_logits, assignment, bias, scale, soft_cap, dtype)
    z = cap.soft_cap(multi.logits(code_logits, assignment, None, scale), soft_cap)
    return (z if bias is None else z + bias.astype(jnp.float32)).astype(dtype)


def _by_blocks(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None,
    scale: jax.Array | None,
    soft_cap: float | None,
    dtype: DTypeLike,
) -> jax.Array:
    """Nor does XLA hold V columns for each codebook where V logits are used more than once."""
    leading, vocab_size = code_logits[0].shape[:-1], len(assignment)
    rows = tuple(l.reshape(-1, l.shape[-1]) for l in code_logits)
    bias, scale = (None if x is None else x.astype(jnp.float32) for x in (bias, scale))
    blocks = token_blocks(jnp.asarray(assignment), scale, bias)

    def of_positions(code_logits: multi.CodeLogits) -> jax.Array:
        tables = transposed(code_logits)

        def of_tokens(block: Blocks) -> jax.Array:
            return block_logits(block, sums(block, tables), soft_cap).astype(dtype)

        z_BxCxP = jax.lax.map(of_tokens, blocks)
        return z_BxCxP.reshape(-1, z_BxCxP.shape[-1])[:vocab_size].T

    z_xPxV = jax.lax.map(of_positions, position_blocks(rows))
    return z_xPxV.reshape(-1, vocab_size)[: len(rows[0])].reshape(*leading, vocab_size)
