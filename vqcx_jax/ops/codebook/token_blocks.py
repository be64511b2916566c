"""Sums of code logits for blocks of tokens and positions, in plain JAX.

A block's logits are sums of M rows of transposed code logits, (K_m, P) for P positions: rows are
gathered whole, so the inner loop runs over positions, which lie side by side.
"""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from vqcx_jax.ops import soft_cap as cap
from vqcx_jax.ops.codebook import multi

# Rows of 64 positions are four cache lines, and 4096 of them (16 codebooks of 256) 1 MB: they stay
# in a cache. XLA on CPUs leaves blocks of fewer than 2048 tokens to one core.
_POSITIONS = 64
_TOKENS = 2048

_Tree = TypeVar("_Tree")


class Blocks(NamedTuple):
    """Blocks of C tokens: codes int (B, M, C), scale and bias (B, C)."""

    codes: jax.Array
    scale: jax.Array | None
    bias: jax.Array


def token_blocks(
    assignment_VxM: jax.Array, scale_V: jax.Array | None, bias_V: jax.Array | None
) -> Blocks:
    """Tokens in blocks; the last one is filled up with impossible tokens."""
    vocab_size = len(assignment_VxM)
    size = min(vocab_size, _TOKENS)
    if bias_V is None:
        bias_V = jnp.zeros((vocab_size,), jnp.float32)
    return Blocks(
        codes=_blocked(assignment_VxM, size).swapaxes(1, 2),
        scale=None if scale_V is None else _blocked(scale_V, size),
        bias=_blocked(bias_V, size, -jnp.inf),
    )


def position_blocks(per_position: _Tree) -> _Tree:
    """A tree of (N, ...) in blocks, of much the same size; the last one is filled up with zeros."""
    num_positions = len(jax.tree.leaves(per_position)[0])
    num_blocks = max(1, -(-num_positions // _POSITIONS))
    size = max(1, -(-num_positions // num_blocks))
    return jax.tree.map(lambda x: _blocked(x, size), per_position)


def _blocked(x: jax.Array, size: int, fill: float = 0) -> jax.Array:
    """(n, ...) as (n / size, size, ...), rounded up and filled up."""
    padding = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding, constant_values=fill).reshape(-1, size, *x.shape[1:])


def transposed(code_logits: multi.CodeLogits) -> multi.CodeLogits:
    """(K_m, P) from (P, K_m)."""
    return tuple(l.T for l in code_logits)


def sums(block: Blocks, tables: multi.CodeLogits) -> jax.Array:
    """Code logits summed over codebooks, (C, P)."""
    rows = (table[codes] for table, codes in zip(tables, block.codes, strict=True))
    return functools.reduce(jnp.add, rows)


def block_logits(block: Blocks, sums_CxP: jax.Array, soft_cap: float | None = None) -> jax.Array:
    """Of `sums`, float32 (C, P): cap(scale sum) + bias; see `ops.soft_cap`."""
    if block.scale is not None:
        sums_CxP = sums_CxP * block.scale[:, None]
    return cap.soft_cap(sums_CxP, soft_cap) + block.bias[:, None]
