"""The backward kernel of token logits on TPUs: by code logits, and by bias and scale of tokens.

The gradient by code logits is a sum over tokens: the tiles of a block of positions pass in turn.
Those by bias and scale are sums over positions: they stay in vector memory, V numbers each, for the
whole of a group of positions. A chip with two cores gives each of them a group.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops import tpu
from vqcx_jax.ops.codebook import tpu_tiles
from vqcx_jax.ops.codebook.tpu_tiles import Tile, Tokens
from vqcx_jax.ops.dispatch import NotSupported

_MAX_SUMS = 2**21  # Over positions, 8 MB.

# Of some rows: their slice, the sums of code logits float32 (R, T), the tile's tokens and the other
# operands. Gives gradients by the logits and by the products with scales that are in them, (R, T).
OfRows = Callable[..., tuple[jax.Array, jax.Array]]


def check_size(vocab_size: int, scale: jax.Array | None) -> None:
    """Raises NotSupported where sums for all tokens do not fit vector memory."""
    if vocab_size * (1 if scale is None else 2) > _MAX_SUMS:
        raise NotSupported(f"vocab_size={vocab_size}: at most {_MAX_SUMS}, half of it with scales")


def gradients(
    of_rows: OfRows,
    name: str,
    tile: Tile,
    num_codes: tuple[int, ...],
    l_NxC: jax.Array,
    tokens: Tokens,
    others: Sequence[jax.Array],
    interpret: Any,
) -> tuple[jax.Array, Tokens]:
    """Gradients by code logits and tokens.

    Args:
        of_rows: what differs between operations.
        name: of the kernel.
        num_codes: see `tpu_tiles.padded_num_codes`.
        others: operands (N, 1) or (N, V), of which a tile gets its part.
        interpret: `pltpu.InterpretParams`, or False.

    Returns:
        (N, C) in the dtype of l; `Tokens` without codes.
    """
    p, t, _ = tile
    num_blocks, vocab_size = l_NxC.shape[0] // p, tokens.bias.shape[1]
    num_groups = 2 if num_blocks % 2 == 0 else 1
    of_group = num_blocks // num_groups

    def rows(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((p, width), lambda g, i, j: (g * of_group + i, 0))

    whole = pl.BlockSpec((p, t), lambda g, i, j: (g * of_group + i, j))
    per_token = pl.BlockSpec((None, 1, vocab_size), lambda g, i, j: (g, 0, 0))
    d_token = tpu.out_shape((num_groups, 1, vocab_size), jnp.float32, l_NxC)
    num_d_tokens = 1 if tokens.scale is None else 2
    d_l_NxC, d_bias, *d_scale = pl.pallas_call(
        functools.partial(_kernel, of_rows, tile, num_codes, len(others)),
        grid=(num_groups, of_group, vocab_size // t),
        in_specs=[
            rows(l_NxC.shape[1]),
            tpu_tiles.token_specs(tokens, t, lambda g, i, j: (0, j)),
            *(rows(1) if x.shape[1] == 1 else whole for x in others),
        ],
        out_specs=[rows(l_NxC.shape[1]), *[per_token] * num_d_tokens],
        out_shape=[tpu.out_shape(l_NxC.shape, jnp.float32, l_NxC), *[d_token] * num_d_tokens],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tpu.VMEM_LIMIT,
        ),
        interpret=interpret,
        name=name,
    )(l_NxC, tokens, *others)
    d_scale_1xV = jnp.sum(d_scale[0], axis=0) if d_scale else None
    d_tokens = Tokens(None, d_scale_1xV, jnp.sum(d_bias, axis=0))  # type: ignore[arg-type]
    return d_l_NxC.astype(l_NxC.dtype), d_tokens


def _kernel(
    of_rows: OfRows,
    tile: Tile,
    num_codes: tuple[int, ...],
    num_others: int,
    l_ref: Any,
    tokens: Any,
    *refs: Any,
) -> None:
    others, (d_l_ref, d_bias_ref, *d_scale_ref) = refs[:num_others], refs[num_others:]
    first_tile = pl.program_id(2) == 0

    @pl.when(first_tile)
    def _() -> None:
        d_l_ref[...] = jnp.zeros_like(d_l_ref)

    @pl.when(first_tile & (pl.program_id(1) == 0))
    def _() -> None:
        for ref in (d_bias_ref, *d_scale_ref):
            ref[...] = jnp.zeros_like(ref)

    s_CxT = tpu_tiles.selection(tokens.codes, num_codes)
    d_bias_1xT = d_scale_1xT = jnp.zeros((1, tile.tokens), jnp.float32)
    for rows in tile.rows():
        sums_RxT = tpu_tiles.dot(l_ref[rows], s_CxT)
        d_z_RxT, d_product_RxT = of_rows(rows, sums_RxT, tokens, *others)
        d_bias_1xT += jnp.sum(d_z_RxT, axis=0, keepdims=True)
        if tokens.scale is not None:
            d_scale_1xT += jnp.sum(d_product_RxT * sums_RxT, axis=0, keepdims=True)
            d_product_RxT = d_product_RxT * tokens.scale[...]
        d_l_ref[rows] += tpu_tiles.dot(d_product_RxT.astype(l_ref.dtype), s_CxT, transposed=True)
    here = pl.ds(pl.multiple_of(pl.program_id(2) * tile.tokens, tpu.LANES), tile.tokens)
    d_bias_ref[:, here] += d_bias_1xT
    if d_scale_ref:
        d_scale_ref[0][:, here] += d_scale_1xT
