"""Any number of codebooks, V logits at a time never: the vocabulary passes in blocks.

A block's logits are sums of M rows of the transposed code logits, table_SxN with S = sum_m K_m,
times the tokens' scales: rows are gathered whole, so the inner loop runs over positions, which lie
side by side. Forward keeps a running maximum and a running sum; backward gathers each block again.
Exact, float32 throughout: N V (M + one exponential) operations forward and twice that backward.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.varying import varying_like

# A block has this many logits, so that it stays in a cache, or this many tokens, whichever is more.
_BLOCK_LOGITS = 2**18
_BLOCK_TOKENS = 128

_Operands = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]
_Residuals = tuple[_Operands, jax.Array, jax.Array]


class _Blocks(NamedTuple):
    """Blocks of C tokens: rows of the table int (B, C, M), scale and bias (B, C)."""

    rows: jax.Array
    scale: jax.Array | None
    bias: jax.Array


def log_z(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> jax.Array:
    """logsumexp_v of z_v = scale[v] sum_m code_logits[m][assignment[v, m]] + bias[v].

    Args:
        code_logits: M arrays, float32 (..., K_m). assignment: int (V, M), column m in [0, K_m).
        bias, scale: (V,) or None.

    Returns:
        float32 (...).

    Raises:
        UserError: assignment is not (V, M).
    """
    multi.check_assignment(code_logits, assignment)
    leading = code_logits[0].shape[:-1]
    sizes = [l.shape[-1] for l in code_logits]
    first_rows = [0, *itertools.accumulate(sizes)][:-1]
    table_SxN = jnp.concatenate([l.reshape(-1, l.shape[-1]) for l in code_logits], axis=-1).T
    bias, scale = (
        None if x is None else varying_like(x.astype(jnp.float32), table_SxN) for x in (bias, scale)
    )
    rows_VxM = assignment + jnp.asarray(first_rows, assignment.dtype)
    return _log_z(table_SxN, rows_VxM, scale, bias).reshape(leading)


def nll(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and log Z, equal to `reference.nll_of_logits`, for any M.

    Args:
        targets: int (...), values in [0, V). Others as in `log_z`.

    Returns:
        nll, log_z: float32 (...).

    Raises:
        UserError: assignment is not (V, M).
    """
    z = log_z(code_logits, assignment, bias, scale)
    return z - multi.target_logits(code_logits, assignment, targets, bias, scale), z


@jax.custom_vjp
def _log_z(
    table_SxN: jax.Array,
    rows_VxM: jax.Array,
    scale_V: jax.Array | None,
    bias_V: jax.Array | None,
) -> jax.Array:
    return _forward(table_SxN, rows_VxM, scale_V, bias_V)[0]


def _forward(
    table_SxN: jax.Array,
    rows_VxM: jax.Array,
    scale_V: jax.Array | None,
    bias_V: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
    def add_block(
        carry: tuple[jax.Array, jax.Array], block: _Blocks
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        peak_N, sum_N = carry
        z_CxN = _logits(block, _sums(block, table_SxN))
        new_peak_N = jnp.maximum(peak_N, jnp.max(z_CxN, axis=0))
        # Until a token that is not banned by bias = -inf comes, the peak is -inf.
        shift_N = jnp.where(new_peak_N == -jnp.inf, 0.0, new_peak_N)
        block_sum_N = jnp.sum(jnp.exp(z_CxN - shift_N), axis=0)
        return (new_peak_N, sum_N * jnp.exp(peak_N - shift_N) + block_sum_N), None

    start = (jnp.full_like(table_SxN[0], -jnp.inf), jnp.zeros_like(table_SxN[0]))
    blocks = _blocks(rows_VxM, scale_V, bias_V, table_SxN.shape[1])
    (peak_N, sum_N), _ = jax.lax.scan(add_block, start, blocks)
    # log Z in two parts: exp(z - peak) / sum keeps its digits where exp(z - log Z) would not.
    return peak_N + jnp.log(sum_N), ((table_SxN, rows_VxM, scale_V, bias_V), peak_N, sum_N)


def _backward(
    residuals: _Residuals, g_N: jax.Array
) -> tuple[jax.Array, None, jax.Array | None, jax.Array | None]:
    (table_SxN, rows_VxM, scale_V, bias_V), peak_N, sum_N = residuals
    scale_N = g_N / sum_N

    def add_block(
        d_table_SxN: jax.Array, block: _Blocks
    ) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
        sums_CxN = _sums(block, table_SxN)
        d_z_CxN = scale_N * jnp.exp(_logits(block, sums_CxN) - peak_N)
        d_bias_C = jnp.sum(d_z_CxN, axis=1)
        d_scale_C = None
        if block.scale is not None:
            d_scale_C = jnp.sum(d_z_CxN * sums_CxN, axis=1)
            d_z_CxN = d_z_CxN * block.scale[:, None]
        for m in range(rows_VxM.shape[1]):
            d_table_SxN = d_table_SxN.at[block.rows[:, m]].add(d_z_CxN)
        return d_table_SxN, (d_scale_C, d_bias_C)

    blocks = _blocks(rows_VxM, scale_V, bias_V, table_SxN.shape[1])
    d_table_SxN, d_tokens = jax.lax.scan(add_block, jnp.zeros_like(table_SxN), blocks)
    d_scale_V, d_bias_V = (
        None if like is None or d is None else d.reshape(-1)[: len(rows_VxM)]
        for d, like in zip(d_tokens, (scale_V, bias_V), strict=True)
    )
    return d_table_SxN, None, d_scale_V, d_bias_V


_log_z.defvjp(_forward, _backward)


def _blocks(
    rows_VxM: jax.Array, scale_V: jax.Array | None, bias_V: jax.Array | None, num_positions: int
) -> _Blocks:
    """Tokens in blocks of equal size; the last one is filled up with impossible tokens."""
    v, m = rows_VxM.shape
    size = min(v, max(_BLOCK_LOGITS // num_positions, _BLOCK_TOKENS))
    num_blocks = -(-v // size)
    missing = num_blocks * size - v
    bias_V = jnp.zeros((v,), jnp.float32) if bias_V is None else bias_V
    rows = jnp.pad(rows_VxM, ((0, missing), (0, 0))).reshape(num_blocks, size, m)
    bias = jnp.pad(bias_V, (0, missing), constant_values=-jnp.inf).reshape(num_blocks, size)
    if scale_V is None:
        return _Blocks(rows, None, bias)
    return _Blocks(rows, jnp.pad(scale_V, (0, missing)).reshape(num_blocks, size), bias)


def _sums(block: _Blocks, table_SxN: jax.Array) -> jax.Array:
    """Code logits summed over codebooks, (C, N)."""
    columns = range(block.rows.shape[1])
    return functools.reduce(jnp.add, (table_SxN[block.rows[:, m]] for m in columns))


def _logits(block: _Blocks, sums_CxN: jax.Array) -> jax.Array:
    if block.scale is not None:
        sums_CxN = sums_CxN * block.scale[:, None]
    return sums_CxN + block.bias[:, None]
