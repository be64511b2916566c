"""Pallas kernels for TPUs: positions sorted by class, a tile's logits one product with a matrix S.

The logits of P positions of one class are the product of their code logits, (P, M K), with the
matrix S of `tpu_tiles` for the members of the class, (M K, R). A class has as many tiles of P
positions as it needs, so that there are at most N / P + C of them: where a gather would read N R M
numbers one by one, S of each class that occurs is made once, in vector memory.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from vqcx_jax.ops.codebook import tpu_tiles
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights, num_frequent
from vqcx_jax.ops.product import product
from vqcx_jax.ops.tpu import LANES, VMEM_LIMIT, out_shape
from vqcx_jax.ops.varying import varying_like

_ROWS = 16  # P: a register of bfloat16 has so many rows.
_LOG2_E = math.log2(math.e)


class _Static(NamedTuple):
    num_codes: tuple[int, ...]  # Rows of S for each codebook.
    interpret: Any


class _Tiles(NamedTuple):
    """Where sorted positions stand; S = T P slots in T tiles.

    Attributes:
        class_of: int (T,), the class of each tile; tiles that are not used repeat the last one.
        num_used: int (1,), how many tiles are.
        position_of: int (S,), N: none.
        slot_of: int (N,), S: none, the position has no class.
        rank: int32 (T, 1, P), that of the target of each slot; -1: none.
    """

    class_of: jax.Array
    num_used: jax.Array
    position_of: jax.Array
    slot_of: jax.Array
    rank: jax.Array


class _Members(NamedTuple):
    """By class, R rounded up to lanes: codes int (C, M, R), scale float32 (C, 1, R) or None, bias.

    Bias times log2 e, -inf where there is no member.
    """

    codes: jax.Array
    scale: jax.Array | None
    bias: jax.Array


def nll(
    h: jax.Array,
    weights: Weights,
    classes: Classes,
    class_: jax.Array,
    rank: jax.Array,
    *,
    product_dtype: DTypeLike = "float32",
    interpret: Any = False,
) -> jax.Array:
    """See `api.nll`.

    Args:
        interpret: `pltpu.InterpretParams` to run on a CPU.

    Raises:
        NotSupported: more than 4096 code logits.
        UserError: product_dtype is neither float32 nor bfloat16.
    """
    num_codebooks, num_codes_of_one, _ = weights.codebooks.shape
    num_codes = tpu_tiles.padded_num_codes([num_codes_of_one] * num_codebooks)
    tpu_tiles.check_product_dtype(product_dtype)
    h_NxD = h.reshape(-1, h.shape[-1])
    # One product with zeros, and not M of slices: nothing is moved to codebooks in front and back.
    l_NxC = product(h_NxD, _block_diagonal(weights.codebooks, sum(num_codes)))
    log2_p_N = _log2_p(
        _Static(num_codes, interpret),
        (_LOG2_E * l_NxC).astype(product_dtype),
        _by_class(weights, classes, l_NxC),
        _arrange(class_.reshape(-1), rank.reshape(-1), len(classes.members)),
    )
    return (-log2_p_N / _LOG2_E).reshape(class_.shape)


def _block_diagonal(codebooks_MxKxW: jax.Array, num_rows: int) -> jax.Array:
    """Codebook m in rows from m K on, K rounded up, and columns from m W on: (C, D)."""
    num_codebooks, _, width = codebooks_MxKxW.shape
    padded = tpu_tiles.pad_codes(codebooks_MxKxW)
    is_own = np.eye(num_codebooks, dtype=bool)[:, None, :, None]
    blocks_MxKxMxW = jnp.where(is_own, padded[:, :, None], 0)
    rows = blocks_MxKxMxW.reshape(-1, num_codebooks * width)
    return jnp.pad(rows, ((0, num_rows - len(rows)), (0, 0)))


def _arrange(class_N: jax.Array, rank_N: jax.Array, num_classes: int) -> _Tiles:
    num_positions = class_N.size
    num_tiles = -(-num_positions // _ROWS) + num_classes
    key_N = jnp.where(class_N < 0, num_classes, class_N)
    order_N = jnp.argsort(key_N)
    class_sorted_N = key_N[order_N]
    # Sorted: a class begins where its first position stands.
    bounds = jnp.searchsorted(class_sorted_N, jnp.arange(num_classes + 1))
    tiles_C = -(-jnp.diff(bounds) // _ROWS)
    ends_C = jnp.cumsum(tiles_C)
    first_C = ends_C - tiles_C
    num_used = ends_C[-1]
    last = jnp.minimum(jnp.arange(num_tiles), jnp.maximum(num_used - 1, 0))
    class_of_T = jnp.searchsorted(ends_C, last, side="right").astype(jnp.int32)
    of_class = jnp.minimum(class_sorted_N, num_classes - 1)
    slot_sorted_N = first_C[of_class] * _ROWS + jnp.arange(num_positions) - bounds[of_class]
    num_slots = num_tiles * _ROWS
    slot_sorted_N = jnp.where(class_sorted_N == num_classes, num_slots, slot_sorted_N)
    position_S = jnp.full(num_slots, num_positions).at[slot_sorted_N].set(order_N, mode="drop")
    return _Tiles(
        jnp.minimum(class_of_T, num_classes - 1),
        num_used[None].astype(jnp.int32),
        position_S,
        jnp.zeros(num_positions, jnp.int32).at[order_N].set(slot_sorted_N),
        _by_tile(jnp.append(rank_N.astype(jnp.int32), -1), position_S),
    )


def _by_tile(x: jax.Array, position_S: jax.Array) -> jax.Array:
    """Of N + 1 numbers those of the slots, (T, 1, P)."""
    return x[position_S].reshape(-1, 1, _ROWS)


def _by_class(weights: Weights, classes: Classes, like: jax.Array) -> _Members:
    padding = -classes.members.shape[1] % LANES
    members_CxR = jnp.pad(classes.members, ((0, 0), (0, padding)), constant_values=-1)
    arrays = []
    for x in (weights.scale, weights.bias):
        x = None if x is None else varying_like(x.astype(jnp.float32), like)
        arrays.append(None if x is None else _gather(x, members_CxR, classes)[:, None])
    scale, bias = arrays
    zeros_Cx1xR = jnp.zeros(members_CxR.shape, jnp.float32)[:, None]
    bias = zeros_Cx1xR if bias is None else _LOG2_E * bias
    bias = jnp.where(members_CxR[:, None] < 0, -jnp.inf, bias)
    codes_CxMxR = jnp.pad(weights.codes.of_members, ((0, 0), (0, 0), (0, padding)))
    return jax.tree.map(lambda x: varying_like(x, like), _Members(codes_CxMxR, scale, bias))


@jax.custom_vjp
def _gather(x_V: jax.Array, members_CxR: jax.Array, classes: Classes) -> jax.Array:
    """X of the members, any number where there is none. Its transpose is a gather, too."""
    return x_V[jnp.maximum(members_CxR, 0)]


def _gather_forward(x_V: jax.Array, members_CxR: jax.Array, classes: Classes) -> Any:
    return _gather(x_V, members_CxR, classes), (classes, len(x_V))


def _gather_backward(residuals: Any, g_CxR: jax.Array) -> Any:
    classes, size = residuals
    class_V = classes.entry_of - num_frequent(classes)
    d_V = jnp.where(class_V < 0, 0.0, g_CxR[jnp.maximum(class_V, 0), classes.rank_of])
    return jnp.pad(d_V, (0, size - len(d_V))), None, None


_gather.defvjp(_gather_forward, _gather_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log2_p(static: _Static, l_NxC: jax.Array, members: _Members, tiles: _Tiles) -> jax.Array:
    return _forward(static, l_NxC, members, tiles)[0]


def _forward(
    static: _Static, l_NxC: jax.Array, members: _Members, tiles: _Tiles
) -> tuple[jax.Array, Any]:
    l_SxC = l_NxC[jnp.minimum(tiles.position_of, len(l_NxC) - 1)]
    (log2_p_Tx1xP,) = _call(
        functools.partial(_forward_kernel, static),
        "vqcx_members_forward",
        static,
        tiles,
        [l_SxC, tiles.rank],
        members,
        [_Out(tiles.rank.shape, jnp.float32)],
    )
    log2_p_N = log2_p_Tx1xP.reshape(-1).at[tiles.slot_of].get(mode="fill", fill_value=0.0)
    return log2_p_N, (l_SxC, members, tiles)


def _forward_kernel(
    static: _Static,
    class_of_ref: Any,
    num_used_ref: Any,
    l_ref: Any,
    rank_ref: Any,
    members: Any,
    log2_p_ref: Any,
) -> None:
    @pl.when(pl.program_id(0) < num_used_ref[0])
    def _() -> None:
        s_CxR = tpu_tiles.selection(members.codes, static.num_codes)
        z_PxR = tpu_tiles.logits(members, tpu_tiles.dot(l_ref[...], s_CxR))
        peak = jnp.max(z_PxR, axis=1, keepdims=True)
        total = jnp.sum(jnp.exp2(z_PxR - peak), axis=1, keepdims=True)
        is_target = _is_target(z_PxR, _column(rank_ref[...]))
        target = jnp.sum(jnp.where(is_target, z_PxR, 0.0), axis=1, keepdims=True)
        log2_p_ref[...] = _row(target - peak - jnp.log2(total))


def _backward(static: _Static, residuals: Any, g_N: jax.Array) -> tuple[Any, ...]:
    l_SxC, members, tiles = residuals
    num_classes, _, width = members.bias.shape
    per_class = _Out((num_classes, 1, width), jnp.float32, per_class=True)
    outs = [_Out(l_SxC.shape, l_SxC.dtype), per_class]
    outs += [] if members.scale is None else [per_class]
    d_l_SxC, *d_members = _call(
        functools.partial(_backward_kernel, static),
        "vqcx_members_backward",
        static,
        tiles,
        [l_SxC, tiles.rank, _by_tile(jnp.append(g_N, 0.0), tiles.position_of)],
        members,
        outs,
    )
    # What no tile has written is whatever was there.
    d_l_NxC = d_l_SxC.at[tiles.slot_of].get(mode="fill", fill_value=0)
    is_used_T = jnp.arange(len(tiles.class_of)) < tiles.num_used
    occurs_C = jnp.zeros(num_classes, bool).at[tiles.class_of].max(is_used_T)
    d_bias, *d_scale = (jnp.where(occurs_C[:, None, None], d, 0.0) for d in d_members)
    d_all = _Members(None, d_scale[0] if d_scale else None, d_bias)  # type: ignore[arg-type]
    return d_l_NxC, d_all, None


def _backward_kernel(
    static: _Static,
    class_of_ref: Any,
    num_used_ref: Any,
    l_ref: Any,
    rank_ref: Any,
    g_ref: Any,
    members: Any,
    d_l_ref: Any,
    d_bias_ref: Any,
    *d_scale_ref: Any,
) -> None:
    tile = pl.program_id(0)
    is_first = (tile == 0) | (class_of_ref[tile] != class_of_ref[jnp.maximum(tile - 1, 0)])

    @pl.when(is_first)
    def _() -> None:
        for ref in (d_bias_ref, *d_scale_ref):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(tile < num_used_ref[0])
    def _() -> None:
        s_CxR = tpu_tiles.selection(members.codes, static.num_codes)
        sums_PxR = tpu_tiles.dot(l_ref[...], s_CxR)
        z_PxR = tpu_tiles.logits(members, sums_PxR)
        e_PxR = jnp.exp2(z_PxR - jnp.max(z_PxR, axis=1, keepdims=True))
        p_PxR = e_PxR / jnp.sum(e_PxR, axis=1, keepdims=True)
        rank = _column(rank_ref[...])
        d_z_PxR = _column(g_ref[...]) * (jnp.where(_is_target(z_PxR, rank), 1.0, 0.0) - p_PxR)
        d_z_PxR = jnp.where(rank >= 0, d_z_PxR, 0.0)
        d_bias_ref[...] += jnp.sum(d_z_PxR, axis=0, keepdims=True)
        if d_scale_ref:
            d_scale_ref[0][...] += jnp.sum(d_z_PxR * sums_PxR, axis=0, keepdims=True)
            d_z_PxR = d_z_PxR * members.scale[...]
        d_l_PxC = tpu_tiles.dot(d_z_PxR.astype(l_ref.dtype), s_CxR, transposed=True)
        d_l_ref[...] = d_l_PxC.astype(d_l_ref.dtype)


_log2_p.defvjp(_forward, _backward)


class _Out(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    per_class: bool = False  # Or of the slots of a tile.


def _call(
    kernel: Any,
    name: str,
    static: _Static,
    tiles: _Tiles,
    rows: list[jax.Array],
    members: _Members,
    outs: list[_Out],
) -> list[jax.Array]:
    """One step for each tile: what its slots have, and the members of its class."""

    def tile_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        if len(shape) == 2:
            return pl.BlockSpec((_ROWS, shape[1]), lambda i, *_: (i, 0))
        return pl.BlockSpec((None, 1, _ROWS), lambda i, *_: (i, 0, 0))

    def class_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda i, class_of, _: (class_of[i], 0, 0))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=tiles.class_of.shape,
            in_specs=[
                *(tile_spec(x.shape) for x in rows),
                jax.tree.map(lambda x: class_spec(x.shape), members),
            ],
            out_specs=[
                class_spec(out.shape) if out.per_class else tile_spec(out.shape) for out in outs
            ],
        ),
        out_shape=[out_shape(out.shape, out.dtype, rows[0]) for out in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=static.interpret,
        name=name,
    )(tiles.class_of, tiles.num_used, *rows, members)


def _is_target(z_PxR: jax.Array, rank_Px1: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, z_PxR.shape, 1) == rank_Px1


def _column(row_1xP: jax.Array) -> jax.Array:
    """(P, 1). Numbers of slots lie along lanes in memory, where a column would be padded to 128."""
    return jnp.sum(jnp.where(_diagonal(), row_1xP, 0), axis=1, keepdims=True)


def _row(column_Px1: jax.Array) -> jax.Array:
    """(1, P)."""
    return jnp.sum(jnp.where(_diagonal(), column_Px1, 0), axis=0, keepdims=True)


def _diagonal() -> jax.Array:
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (_ROWS, _ROWS), i) for i in (0, 1))
    return rows == columns
