"""Pallas kernels for TPUs: tiles of V logits as products with the matrix S of `tpu_tiles`.

What bounds them is the writing, or backward the reading, of N V numbers. The gradient by code
logits, a scatter-add by code, is the product with the transpose of S.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from vqcx_jax.ops import soft_cap as cap
from vqcx_jax.ops.codebook import multi, tpu_tiles
from vqcx_jax.ops.codebook.tpu_tiles import VMEM_LIMIT, Tile, Tokens
from vqcx_jax.ops.dispatch import NotSupported

_TILE = Tile(512, 1024, 512)
_SMALL_TILE = Tile(256, 512, 256)  # Thousands of codes make a tile of S as large as that of logits.
_MAX_SUMS = 2**21  # Over positions, 8 MB.


class _Static(NamedTuple):
    num_codes: tuple[int, ...]  # Rows of S for each codebook.
    shape: tuple[int, int]  # N, V without padding.
    soft_cap: float | None
    dtype: Any
    tile: Tile
    interpret: Any


def logits(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    *,
    soft_cap: float | None = None,
    dtype: DTypeLike = "float32",
    product_dtype: DTypeLike = "float32",
    tile: Tile | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `api.logits`.

    Args:
        tile: None: one that fits every chip.
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
    tile = tile or (_TILE if sum(num_codes) <= 1024 else _SMALL_TILE)
    tile = tile.within(num_positions, vocab_size)
    padded_positions = tpu_tiles.up(num_positions, tile.positions)
    padded_tokens = tpu_tiles.up(vocab_size, tile.tokens)
    l_NxC = tpu_tiles.joined(code_logits, num_codes, padded_positions, product_dtype)
    tokens = tpu_tiles.tokens(assignment, scale, bias, padded_tokens, l_NxC)
    shape = (num_positions, vocab_size)
    static = _Static(num_codes, shape, soft_cap, jnp.dtype(dtype), tile, interpret)
    return _logits(static, l_NxC, tokens).reshape(*leading, vocab_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(static: _Static, l_NxC: jax.Array, tokens: Tokens) -> jax.Array:
    return _forward(static, l_NxC, tokens)[0]


def _forward(
    static: _Static, l_NxC: jax.Array, tokens: Tokens
) -> tuple[jax.Array, tuple[jax.Array, Tokens]]:
    p, t, _ = static.tile
    z_NxV = pl.pallas_call(
        functools.partial(_forward_kernel, static),
        grid=(l_NxC.shape[0] // p, tokens.bias.shape[1] // t),
        in_specs=[
            pl.BlockSpec((p, l_NxC.shape[1]), lambda i, j: (i, 0)),
            tpu_tiles.token_specs(tokens, t, lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((p, t), lambda i, j: (i, j)),
        out_shape=tpu_tiles.out_shape(static.shape, static.dtype, l_NxC),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=static.interpret,
        name="vqcx_codebook_logits_forward",
    )(l_NxC, tokens)
    return z_NxV, (l_NxC, tokens)


def _forward_kernel(static: _Static, l_ref: Any, tokens: Any, z_ref: Any) -> None:
    s_CxT = tpu_tiles.selection(tokens.codes, static.num_codes)
    for rows in static.tile.rows():
        sums_RxT = tpu_tiles.dot(l_ref[rows], s_CxT)
        z_ref[rows] = (_product(static, tokens, sums_RxT) + tokens.bias[...]).astype(z_ref.dtype)


def _backward(
    static: _Static, residuals: tuple[jax.Array, Tokens], g_NxV: jax.Array
) -> tuple[jax.Array, Tokens]:
    l_NxC, tokens = residuals
    p, t, _ = static.tile
    num_blocks, vocab_size = l_NxC.shape[0] // p, tokens.bias.shape[1]
    # Sums over positions are of a group's; each core of a chip takes a group.
    num_groups = 2 if num_blocks % 2 == 0 else 1
    of_group = num_blocks // num_groups
    rows = pl.BlockSpec((p, l_NxC.shape[1]), lambda g, i, j: (g * of_group + i, 0))
    per_token = pl.BlockSpec((None, 1, vocab_size), lambda g, i, j: (g, 0, 0))
    d_token = tpu_tiles.out_shape((num_groups, 1, vocab_size), jnp.float32, l_NxC)
    num_d_tokens = 1 if tokens.scale is None else 2
    d_l_NxC, d_bias, *d_scale = pl.pallas_call(
        functools.partial(_backward_kernel, static),
        grid=(num_groups, of_group, vocab_size // t),
        in_specs=[
            rows,
            tpu_tiles.token_specs(tokens, t, lambda g, i, j: (0, j)),
            pl.BlockSpec((p, t), lambda g, i, j: (g * of_group + i, j)),
        ],
        out_specs=[rows, *[per_token] * num_d_tokens],
        out_shape=[tpu_tiles.out_shape(l_NxC.shape, jnp.float32, l_NxC), *[d_token] * num_d_tokens],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=static.interpret,
        name="vqcx_codebook_logits_backward",
    )(l_NxC, tokens, g_NxV)
    d_scale_1xV = jnp.sum(d_scale[0], axis=0) if d_scale else None
    d_bias_1xV = jnp.sum(d_bias, axis=0)
    return d_l_NxC.astype(l_NxC.dtype), Tokens(None, d_scale_1xV, d_bias_1xV)  # type: ignore[arg-type]


def _backward_kernel(
    static: _Static,
    l_ref: Any,
    tokens: Any,
    g_ref: Any,
    d_l_ref: Any,
    d_bias_ref: Any,
    *d_scale_ref: Any,
) -> None:
    group, block, tile_index = (pl.program_id(axis) for axis in range(3))

    @pl.when(tile_index == 0)
    def _() -> None:
        d_l_ref[...] = jnp.zeros_like(d_l_ref)

    @pl.when((tile_index == 0) & (block == 0))
    def _() -> None:
        for ref in (d_bias_ref, *d_scale_ref):
            ref[...] = jnp.zeros_like(ref)

    s_CxT = tpu_tiles.selection(tokens.codes, static.num_codes)
    p, t = static.tile.positions, static.tile.tokens
    num_rows = static.shape[0] - (group * pl.num_programs(1) + block) * p
    num_columns = static.shape[1] - tile_index * t
    d_bias_1xT = d_scale_1xT = jnp.zeros((1, t), jnp.float32)
    for rows in static.tile.rows():
        # What lies outside of the array is whatever it is, NaN included.
        g_RxT = g_ref[rows].astype(jnp.float32)
        row = rows.start + jax.lax.broadcasted_iota(jnp.int32, g_RxT.shape, 0)
        column = jax.lax.broadcasted_iota(jnp.int32, g_RxT.shape, 1)
        g_RxT = jnp.where((row < num_rows) & (column < num_columns), g_RxT, 0.0)
        d_bias_1xT += jnp.sum(g_RxT, axis=0, keepdims=True)
        if tokens.scale is not None or static.soft_cap is not None:
            sums_RxT = tpu_tiles.dot(l_ref[rows], s_CxT)
            if static.soft_cap is not None:
                capped_RxT = _product(static, tokens, sums_RxT) / static.soft_cap
                g_RxT = g_RxT * (1.0 - capped_RxT * capped_RxT)
            if tokens.scale is not None:
                d_scale_1xT += jnp.sum(g_RxT * sums_RxT, axis=0, keepdims=True)
                g_RxT = g_RxT * tokens.scale[...]
        d_l_ref[rows] += tpu_tiles.dot(g_RxT.astype(l_ref.dtype), s_CxT, transposed=True)
    here = pl.ds(pl.multiple_of(tile_index * t, tpu_tiles.LANES), t)
    d_bias_ref[:, here] += d_bias_1xT
    if d_scale_ref:
        d_scale_ref[0][:, here] += d_scale_1xT


_logits.defvjp(_forward, _backward)


def _product(static: _Static, tokens: Any, sums_RxT: jax.Array) -> jax.Array:
    """Logits before their bias."""
    if tokens.scale is not None:
        sums_RxT = sums_RxT * tokens.scale[...]
    return cap.soft_cap(sums_RxT, static.soft_cap)
