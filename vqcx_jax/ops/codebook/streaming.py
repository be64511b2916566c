"""Any number of codebooks, V logits at a time never: the vocabulary passes in blocks.

A block's logits are sums of M rows of the transposed code logits, table_SxN with S = sum_m K_m:
rows are gathered whole, so the inner loop runs over positions, which lie side by side. Forward
keeps a running maximum and a running sum; backward gathers each block again.
Exact, float32 throughout: N V (M + one exponential) operations forward and twice that backward.
"""

import itertools

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.varying import varying_like

# A block has this many logits, so that it stays in a cache, or this many tokens, whichever is more.
_BLOCK_LOGITS = 2**18
_BLOCK_TOKENS = 128

_Blocks = tuple[jax.Array, jax.Array]  # Rows of the table, int (B, C, M), and bias (B, C).
_Residuals = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


def log_z(
    code_logits: multi.CodeLogits, assignment: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """logsumexp_v of z_v = sum_m code_logits[m][assignment[v, m]] + bias[v].

    Args:
        code_logits: M arrays, float32 (..., K_m). assignment: int (V, M), column m in [0, K_m).
        bias: (V,) or None.

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
    if bias is not None:
        bias = varying_like(bias.astype(jnp.float32), table_SxN)
    rows_VxM = assignment + jnp.asarray(first_rows, assignment.dtype)
    return _log_z(table_SxN, rows_VxM, bias).reshape(leading)


def nll(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and log Z, equal to `reference.nll_of_logits`, for any M.

    Args:
        targets: int (...), values in [0, V). Others as in `log_z`.

    Returns:
        nll, log_z: float32 (...).

    Raises:
        UserError: assignment is not (V, M).
    """
    z = log_z(code_logits, assignment, bias)
    return z - multi.target_logits(code_logits, assignment, targets, bias), z


@jax.custom_vjp
def _log_z(table_SxN: jax.Array, rows_VxM: jax.Array, bias_V: jax.Array | None) -> jax.Array:
    return _forward(table_SxN, rows_VxM, bias_V)[0]


def _forward(
    table_SxN: jax.Array, rows_VxM: jax.Array, bias_V: jax.Array | None
) -> tuple[jax.Array, _Residuals]:
    def add_block(
        carry: tuple[jax.Array, jax.Array], block: _Blocks
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        peak_N, sum_N = carry
        z_CxN = _block_logits(table_SxN, *block)
        new_peak_N = jnp.maximum(peak_N, jnp.max(z_CxN, axis=0))
        # Until a token that is not banned by bias = -inf comes, the peak is -inf.
        shift_N = jnp.where(new_peak_N == -jnp.inf, 0.0, new_peak_N)
        block_sum_N = jnp.sum(jnp.exp(z_CxN - shift_N), axis=0)
        return (new_peak_N, sum_N * jnp.exp(peak_N - shift_N) + block_sum_N), None

    start = (jnp.full_like(table_SxN[0], -jnp.inf), jnp.zeros_like(table_SxN[0]))
    blocks = _blocks(rows_VxM, bias_V, table_SxN.shape[1])
    (peak_N, sum_N), _ = jax.lax.scan(add_block, start, blocks)
    # log Z in two parts: exp(z - peak) / sum keeps its digits where exp(z - log Z) would not.
    return peak_N + jnp.log(sum_N), (table_SxN, rows_VxM, bias_V, peak_N, sum_N)


def _backward(residuals: _Residuals, g_N: jax.Array) -> tuple[jax.Array, None, jax.Array | None]:
    table_SxN, rows_VxM, bias_V, peak_N, sum_N = residuals
    scale_N = g_N / sum_N

    def add_block(d_table_SxN: jax.Array, block: _Blocks) -> tuple[jax.Array, jax.Array]:
        d_z_CxN = scale_N * jnp.exp(_block_logits(table_SxN, *block) - peak_N)
        for m in range(rows_VxM.shape[1]):
            d_table_SxN = d_table_SxN.at[block[0][:, m]].add(d_z_CxN)
        return d_table_SxN, jnp.sum(d_z_CxN, axis=1)

    blocks = _blocks(rows_VxM, bias_V, table_SxN.shape[1])
    d_table_SxN, d_bias_BxC = jax.lax.scan(add_block, jnp.zeros_like(table_SxN), blocks)
    d_bias_V = None if bias_V is None else d_bias_BxC.reshape(-1)[: rows_VxM.shape[0]]
    return d_table_SxN, None, d_bias_V


_log_z.defvjp(_forward, _backward)


def _blocks(rows_VxM: jax.Array, bias_V: jax.Array | None, num_positions: int) -> _Blocks:
    """Tokens in blocks of equal size; the last one is filled up with impossible tokens."""
    v, m = rows_VxM.shape
    size = min(v, max(_BLOCK_LOGITS // num_positions, _BLOCK_TOKENS))
    num_blocks = -(-v // size)
    missing = num_blocks * size - v
    bias_V = jnp.zeros((v,), jnp.float32) if bias_V is None else bias_V
    rows = jnp.pad(rows_VxM, ((0, missing), (0, 0)))
    bias = jnp.pad(bias_V, (0, missing), constant_values=-jnp.inf)
    return rows.reshape(num_blocks, size, m), bias.reshape(num_blocks, size)


def _block_logits(table_SxN: jax.Array, rows_CxM: jax.Array, bias_C: jax.Array) -> jax.Array:
    z_CxN = bias_C[:, None]
    for m in range(rows_CxM.shape[1]):
        z_CxN = z_CxN + table_SxN[rows_CxM[:, m]]
    return z_CxN
