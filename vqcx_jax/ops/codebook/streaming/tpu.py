"""Pallas kernels for TPUs: a tile's token logits are one product with the matrix S of `tpu_tiles`.

Nothing with V columns is ever written. Everything is in powers of two, which is what exponentials
are made of: l and bias come times log2 e.

Tokens lie along lanes. Maxima and sums are kept for each of the 128 lanes, and taken over lanes
once, at the end. The backward kernel is that of `tpu_gradients`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from vqcx_jax.ops import device
from vqcx_jax.ops.codebook import multi, tpu_tiles
from vqcx_jax.ops.codebook.streaming.block_sizes import BlockSizes, block_sizes
from vqcx_jax.ops.codebook.tpu_gradients import check_size, gradients
from vqcx_jax.ops.codebook.tpu_tiles import Tokens
from vqcx_jax.ops.tpu import LANES, VMEM_LIMIT, out_shape, up

_LOG2_E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)


class _Static(NamedTuple):
    num_codes: tuple[int, ...]  # Rows of S for each codebook.
    blocks: BlockSizes
    interpret: Any


def log_z(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    product_dtype: DTypeLike = "float32",
    blocks: BlockSizes | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.log_z`.

    Args:
        blocks: None: those of the table for this device.
        interpret: `pltpu.InterpretParams` to run on a CPU.

    Raises:
        NotSupported: more than 4096 code logits, or so many tokens that their gradients by bias and
            scale do not fit vector memory.
        UserError: product_dtype is neither float32 nor bfloat16.
    """
    num_codes = tpu_tiles.padded_num_codes(code_logits)
    leading, vocab_size = code_logits[0].shape[:-1], len(assignment)
    num_positions = math.prod(leading)
    check_size(vocab_size, scale)
    if blocks is None:
        kind = device.current().kind
        blocks = block_sizes(kind, sum(num_codes), num_positions, product_dtype)
    blocks = BlockSizes(*(tile.within(num_positions, vocab_size) for tile in blocks))
    padded_positions, padded_tokens = (
        up(size, math.lcm(*of_tiles))
        for size, of_tiles in (
            (num_positions, [tile.positions for tile in blocks]),
            (vocab_size, [tile.tokens for tile in blocks]),
        )
    )
    l_NxC = tpu_tiles.joined(code_logits, num_codes, padded_positions, product_dtype, _LOG2_E)
    tokens = tpu_tiles.tokens(assignment, scale, bias, padded_tokens, l_NxC, _LOG2_E)
    log2_z_N = _log2_z(_Static(num_codes, blocks, interpret), l_NxC, tokens)
    return (log2_z_N[:num_positions] / _LOG2_E).reshape(leading)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log2_z(static: _Static, l_NxC: jax.Array, tokens: Tokens) -> jax.Array:
    return _forward(static, l_NxC, tokens)[0]


def _forward(
    static: _Static, l_NxC: jax.Array, tokens: Tokens
) -> tuple[jax.Array, tuple[jax.Array, Tokens, jax.Array, jax.Array]]:
    num_positions, num_code_logits = l_NxC.shape
    p, t, _ = static.blocks.forward
    column = pl.BlockSpec((p, 1), lambda i, j: (i, 0))
    out = out_shape((num_positions, 1), jnp.float32, l_NxC)
    peak_Nx1, sum_Nx1 = pl.pallas_call(
        functools.partial(_forward_kernel, static),
        grid=(num_positions // p, tokens.bias.shape[1] // t),
        in_specs=[
            pl.BlockSpec((p, num_code_logits), lambda i, j: (i, 0)),
            tpu_tiles.token_specs(tokens, t, lambda i, j: (0, j)),
        ],
        out_specs=[column, column],
        out_shape=[out, out],
        scratch_shapes=[pltpu.VMEM((p, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=static.interpret,
        name="vqcx_codebook_log_z_forward",
    )(l_NxC, tokens)
    log2_z_N = (peak_Nx1 + jnp.log2(sum_Nx1))[:, 0]
    return log2_z_N, (l_NxC, tokens, peak_Nx1, sum_Nx1)


def _forward_kernel(
    static: _Static,
    l_ref: Any,
    tokens: Any,
    peak_ref: Any,
    sum_ref: Any,
    peaks_ref: Any,
    sums_ref: Any,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        peaks_ref[...] = jnp.full_like(peaks_ref, _LOWEST)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    s_CxT = tpu_tiles.selection(tokens.codes, static.num_codes)
    for rows in static.blocks.forward.rows():
        z_RxT = tpu_tiles.logits(tokens, tpu_tiles.dot(l_ref[rows], s_CxT))
        lanes = [z_RxT[:, i : i + LANES] for i in range(0, z_RxT.shape[1], LANES)]
        before = peaks_ref[rows]
        peaks = functools.reduce(jnp.maximum, lanes, before)
        sums = sums_ref[rows] * jnp.exp2(before - peaks)
        sums_ref[rows] = functools.reduce(lambda s, z: s + jnp.exp2(z - peaks), lanes, sums)
        peaks_ref[rows] = peaks

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        peaks = peaks_ref[...]
        peak = jnp.max(peaks, axis=1, keepdims=True)
        peak_ref[...] = peak
        sum_ref[...] = jnp.sum(sums_ref[...] * jnp.exp2(peaks - peak), axis=1, keepdims=True)


def _backward(
    static: _Static, residuals: tuple[jax.Array, Tokens, jax.Array, jax.Array], g_N: jax.Array
) -> tuple[jax.Array, Tokens]:
    l_NxC, tokens, peak_Nx1, sum_Nx1 = residuals

    def of_rows(
        rows: slice, sums_RxT: jax.Array, tokens: Tokens, peak_ref: Any, weight_ref: Any
    ) -> tuple[jax.Array, jax.Array]:
        z_RxT = tpu_tiles.logits(tokens, sums_RxT)
        d_z_RxT = jnp.exp2(z_RxT - peak_ref[rows]) * weight_ref[rows]
        return d_z_RxT, d_z_RxT

    return gradients(
        of_rows,
        "vqcx_codebook_log_z_backward",
        static.blocks.backward,
        static.num_codes,
        l_NxC,
        tokens,
        [peak_Nx1, g_N[:, None] / sum_Nx1],
        static.interpret,
    )


_log2_z.defvjp(_forward, _backward)
