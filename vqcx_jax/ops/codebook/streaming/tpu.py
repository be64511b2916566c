"""Pallas kernels for TPUs: a tile's token logits are one product with the matrix S of `tpu_tiles`.

Nothing with V columns is ever written. Everything is in powers of two, which is what exponentials
are made of: l and bias come times log2 e.

Tokens lie along lanes. Maxima and sums are kept for each of the 128 lanes, and taken over lanes
once, at the end. Gradients by bias and scale are sums over positions: they stay in vector memory, V
numbers each, for the whole of a group of positions.
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
from vqcx_jax.ops.codebook.tpu_tiles import LANES, VMEM_LIMIT, Tokens
from vqcx_jax.ops.dispatch import NotSupported

_LOG2_E = math.log2(math.e)
_LOWEST = float(jnp.finfo(jnp.float32).min)
_MAX_SUMS = 2**21  # Over positions, 8 MB.


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
    if vocab_size * (1 if scale is None else 2) > _MAX_SUMS:
        raise NotSupported(f"vocab_size={vocab_size}: at most {_MAX_SUMS}, half of it with scales")
    blocks = blocks or block_sizes(device.current().chip, sum(num_codes))
    blocks = BlockSizes(*(tile.within(num_positions, vocab_size) for tile in blocks))
    padded_positions, padded_tokens = (
        tpu_tiles.up(size, math.lcm(*of_tiles))
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
    out = tpu_tiles.out_shape((num_positions, 1), jnp.float32, l_NxC)
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
    num_positions, num_code_logits = l_NxC.shape
    p, t, _ = static.blocks.backward
    num_blocks, vocab_size = num_positions // p, tokens.bias.shape[1]
    # Sums over positions are of a group's; each core of a chip takes a group.
    num_groups = 2 if num_blocks % 2 == 0 else 1
    of_group = num_blocks // num_groups
    column = pl.BlockSpec((p, 1), lambda g, i, j: (g * of_group + i, 0))
    rows = pl.BlockSpec((p, num_code_logits), lambda g, i, j: (g * of_group + i, 0))
    per_token = pl.BlockSpec((None, 1, vocab_size), lambda g, i, j: (g, 0, 0))
    d_token = tpu_tiles.out_shape((num_groups, 1, vocab_size), jnp.float32, l_NxC)
    num_d_tokens = 1 if tokens.scale is None else 2
    d_l_NxC, d_bias, *d_scale = pl.pallas_call(
        functools.partial(_backward_kernel, static),
        grid=(num_groups, of_group, vocab_size // t),
        in_specs=[rows, tpu_tiles.token_specs(tokens, t, lambda g, i, j: (0, j)), column, column],
        out_specs=[rows, *[per_token] * num_d_tokens],
        out_shape=[tpu_tiles.out_shape(l_NxC.shape, jnp.float32, l_NxC), *[d_token] * num_d_tokens],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=static.interpret,
        name="vqcx_codebook_log_z_backward",
    )(l_NxC, tokens, peak_Nx1, g_N[:, None] / sum_Nx1)
    d_scale_1xV = jnp.sum(d_scale[0], axis=0) if d_scale else None
    d_bias_1xV = jnp.sum(d_bias, axis=0)
    return d_l_NxC.astype(l_NxC.dtype), Tokens(None, d_scale_1xV, d_bias_1xV)  # type: ignore[arg-type]


def _backward_kernel(
    static: _Static,
    l_ref: Any,
    tokens: Any,
    peak_ref: Any,
    weight_ref: Any,
    d_l_ref: Any,
    d_bias_ref: Any,
    *d_scale_ref: Any,
) -> None:
    first_tile = pl.program_id(2) == 0

    @pl.when(first_tile)
    def _() -> None:
        d_l_ref[...] = jnp.zeros_like(d_l_ref)

    @pl.when(first_tile & (pl.program_id(1) == 0))
    def _() -> None:
        for ref in (d_bias_ref, *d_scale_ref):
            ref[...] = jnp.zeros_like(ref)

    s_CxT = tpu_tiles.selection(tokens.codes, static.num_codes)
    size = tokens.codes.shape[1]
    d_bias_1xT = d_scale_1xT = jnp.zeros((1, size), jnp.float32)
    for rows in static.blocks.backward.rows():
        sums_RxT = tpu_tiles.dot(l_ref[rows], s_CxT)
        d_z_RxT = jnp.exp2(tpu_tiles.logits(tokens, sums_RxT) - peak_ref[rows]) * weight_ref[rows]
        d_bias_1xT += jnp.sum(d_z_RxT, axis=0, keepdims=True)
        if tokens.scale is not None:
            d_scale_1xT += jnp.sum(d_z_RxT * sums_RxT, axis=0, keepdims=True)
            d_z_RxT = d_z_RxT * tokens.scale[...]
        d_l_ref[rows] += tpu_tiles.dot(d_z_RxT.astype(l_ref.dtype), s_CxT, transposed=True)
    tile = pl.ds(pl.multiple_of(pl.program_id(2) * size, LANES), size)
    d_bias_ref[:, tile] += d_bias_1xT
    if d_scale_ref:
        d_scale_ref[0][:, tile] += d_scale_1xT


_log2_z.defvjp(_forward, _backward)
