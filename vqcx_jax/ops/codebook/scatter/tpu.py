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
from vqcx_jax.ops.codebook.tpu_gradients import check_size, gradients
from vqcx_jax.ops.codebook.tpu_tiles import Tile, Tokens
from vqcx_jax.ops.tpu import VMEM_LIMIT, out_shape, up

_TILE = Tile(512, 1024, 512)
_SMALL_TILE = Tile(256, 512, 256)  # Thousands of codes make a tile of S as large as that of logits.


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
    num_codes = tpu_tiles.padded_num_codes([l.shape[-1] for l in code_logits])
    leading, vocab_size = code_logits[0].shape[:-1], len(assignment)
    num_positions = math.prod(leading)
    check_size(vocab_size, scale)
    tile = tile or (_TILE if sum(num_codes) <= 1024 else _SMALL_TILE)
    tile = tile.within(num_positions, vocab_size)
    padded_positions = up(num_positions, tile.positions)
    padded_tokens = up(vocab_size, tile.tokens)
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
        out_shape=out_shape(static.shape, static.dtype, l_NxC),
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

    def of_rows(
        rows: slice, sums_RxT: jax.Array, tokens: Tokens, g_ref: Any
    ) -> tuple[jax.Array, jax.Array]:
        # What lies outside of the array is whatever it is, NaN included.
        g_RxT = g_ref[rows].astype(jnp.float32)
        block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
        row = rows.start + jax.lax.broadcasted_iota(jnp.int32, g_RxT.shape, 0)
        column = jax.lax.broadcasted_iota(jnp.int32, g_RxT.shape, 1)
        is_row = row < static.shape[0] - block * static.tile.positions
        is_column = column < static.shape[1] - pl.program_id(2) * static.tile.tokens
        g_RxT = jnp.where(is_row & is_column, g_RxT, 0.0)
        if static.soft_cap is None:
            return g_RxT, g_RxT
        capped_RxT = _product(static, tokens, sums_RxT) / static.soft_cap
        return g_RxT, g_RxT * (1.0 - capped_RxT * capped_RxT)

    return gradients(
        of_rows,
        "vqcx_codebook_logits_backward",
        static.tile,
        static.num_codes,
        l_NxC,
        tokens,
        [g_NxV],
        static.interpret,
    )


_logits.defvjp(_forward, _backward)


def _product(static: _Static, tokens: Any, sums_RxT: jax.Array) -> jax.Array:
    """Logits before their bias."""
    if tokens.scale is not None:
        sums_RxT = sums_RxT * tokens.scale[...]
    return cap.soft_cap(sums_RxT, static.soft_cap)
