"""Any number of codebooks, V logits at a time never: positions and vocabulary pass in blocks.

How a block's logits are made: `token_blocks`. Forward keeps a running maximum and a running sum;
backward gathers each block again and adds it to the rows it came from. Exact, float32 throughout:
N V (M + one exponential) operations forward and twice that backward.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import multi, scatter
from vqcx_jax.ops.codebook.token_blocks import (
    Blocks,
    block_logits,
    position_blocks,
    sums,
    token_blocks,
    transposed,
)
from vqcx_jax.ops.varying import varying_like

_Operands = tuple[multi.CodeLogits, jax.Array, jax.Array | None, jax.Array | None]
_Residuals = tuple[_Operands, jax.Array, jax.Array]
_PerToken = tuple[jax.Array | None, jax.Array]  # Of scale and bias, (B, C).


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
    rows = tuple(l.reshape(-1, l.shape[-1]) for l in code_logits)
    bias, scale = (
        None if x is None else varying_like(x.astype(jnp.float32), rows[0]) for x in (bias, scale)
    )
    return _log_z(rows, assignment, scale, bias).reshape(leading)


def top_k(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    k: int,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.top_k`. V logits of a block of positions at a time."""

    def of_block(code_logits: multi.CodeLogits) -> tuple[jax.Array, jax.Array, jax.Array]:
        z_PxV = scatter.xla.logits(code_logits, assignment, bias, scale)
        return *jax.lax.top_k(z_PxV, k), jax.nn.logsumexp(z_PxV, axis=-1)

    leading = code_logits[0].shape[:-1]
    rows = tuple(l.reshape(-1, l.shape[-1]) for l in code_logits)
    of_blocks = jax.lax.map(of_block, position_blocks(rows))
    results = (x.reshape(-1, *x.shape[2:])[: len(rows[0])] for x in of_blocks)
    z, tokens, log_z = (x.reshape(*leading, *x.shape[1:]) for x in results)
    return z, tokens, log_z


@jax.custom_vjp
def _log_z(
    code_logits: multi.CodeLogits,
    assignment_VxM: jax.Array,
    scale_V: jax.Array | None,
    bias_V: jax.Array | None,
) -> jax.Array:
    return _forward(code_logits, assignment_VxM, scale_V, bias_V)[0]


def _forward(
    code_logits: multi.CodeLogits,
    assignment_VxM: jax.Array,
    scale_V: jax.Array | None,
    bias_V: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
    num_positions = len(code_logits[0])
    blocks = token_blocks(assignment_VxM, scale_V, bias_V)

    def peak_and_sum(code_logits: multi.CodeLogits) -> tuple[jax.Array, jax.Array]:
        tables = transposed(code_logits)

        def add_block(
            carry: tuple[jax.Array, jax.Array], block: Blocks
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            peak_P, sum_P = carry
            z_CxP = block_logits(block, sums(block, tables))
            new_peak_P = jnp.maximum(peak_P, jnp.max(z_CxP, axis=0))
            # Until a token that is not banned by bias = -inf comes, the peak is -inf.
            shift_P = jnp.where(new_peak_P == -jnp.inf, 0.0, new_peak_P)
            block_sum_P = jnp.sum(jnp.exp(z_CxP - shift_P), axis=0)
            return (new_peak_P, sum_P * jnp.exp(peak_P - shift_P) + block_sum_P), None

        start = (jnp.full_like(tables[0][0], -jnp.inf), jnp.zeros_like(tables[0][0]))
        return jax.lax.scan(add_block, start, blocks)[0]

    of_blocks = jax.lax.map(peak_and_sum, position_blocks(code_logits))
    peak_N, sum_N = (x.reshape(-1)[:num_positions] for x in of_blocks)
    # log Z in two parts: exp(z - peak) / sum keeps its digits where exp(z - log Z) would not.
    operands = (code_logits, assignment_VxM, scale_V, bias_V)
    return peak_N + jnp.log(sum_N), (operands, peak_N, sum_N)


def _backward(
    residuals: _Residuals, g_N: jax.Array
) -> tuple[multi.CodeLogits, None, jax.Array | None, jax.Array | None]:
    (code_logits, assignment_VxM, scale_V, bias_V), peak_N, sum_N = residuals
    blocks = token_blocks(assignment_VxM, scale_V, bias_V)

    def add_positions(
        d_tokens: _PerToken, positions: tuple[multi.CodeLogits, jax.Array, jax.Array]
    ) -> tuple[_PerToken, multi.CodeLogits]:
        code_logits, peak_P, weight_P = positions
        tables = transposed(code_logits)

        def add_block(
            d_tables: multi.CodeLogits, block: Blocks
        ) -> tuple[multi.CodeLogits, _PerToken]:
            sums_CxP = sums(block, tables)
            e_CxP = jnp.exp(block_logits(block, sums_CxP) - peak_P)
            d_bias_C = jnp.sum(e_CxP * weight_P, axis=1)
            d_scale_C = None
            if block.scale is not None:
                d_scale_C = jnp.sum(e_CxP * weight_P * sums_CxP, axis=1)
                e_CxP = e_CxP * block.scale[:, None]
            # As many tables as codebooks, and not one: XLA scatters to several at the same time.
            d_tables = tuple(
                d.at[codes].add(e_CxP) for d, codes in zip(d_tables, block.codes, strict=True)
            )
            return d_tables, (d_scale_C, d_bias_C)

        zeros = tuple(map(jnp.zeros_like, tables))
        d_tables, d_these = jax.lax.scan(add_block, zeros, blocks)
        d_code_logits = tuple((d * weight_P).T for d in d_tables)
        return jax.tree.map(jnp.add, d_tokens, d_these), d_code_logits

    positions = position_blocks((code_logits, peak_N, g_N / sum_N))
    zeros = jax.tree.map(
        lambda x: varying_like(jnp.zeros_like(x), g_N), (blocks.scale, blocks.bias)
    )
    d_tokens, d_blocks = jax.lax.scan(add_positions, zeros, positions)
    d_code_logits = tuple(d.reshape(-1, d.shape[-1])[: len(g_N)] for d in d_blocks)
    d_scale_V, d_bias_V = (
        None if like is None or d is None else d.reshape(-1)[: len(assignment_VxM)]
        for d, like in zip(d_tokens, (scale_V, bias_V), strict=True)
    )
    return d_code_logits, None, d_scale_V, d_bias_V


_log_z.defvjp(_forward, _backward)
