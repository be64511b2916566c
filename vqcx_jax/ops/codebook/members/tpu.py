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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from vqcx_jax.ops.codebook import tpu_tiles
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights, num_frequent
from vqcx_jax.ops.codebook.members.xla import code_logits
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
    """

    class_of: jax.Array
    num_used: jax.Array
    position_of: jax.Array
    slot_of: jax.Array


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
    table_MxNxK = code_logits(h.reshape(-1, h.shape[-1]), weights.codebooks)
    tables = tuple(jnp.unstack(table_MxNxK))
    num_codes = tpu_tiles.padded_num_codes(tables)
    num_positions = class_.size
    # One row more, of zeros, for slots without a position.
    l_NxC = tpu_tiles.joined(tables, num_codes, num_positions + 1, product_dtype, _LOG2_E)
    tiles = _arrange(class_.reshape(-1), len(classes.members))
    rank_S = jnp.append(rank.reshape(-1), 0)[tiles.position_of]
    log2_p_S = _log2_p(
        _Static(num_codes, interpret),
        l_NxC[tiles.position_of],
        _by_class(weights, classes, l_NxC),
        tiles,
        rank_S[:, None],
    )
    of_position = jnp.append(log2_p_S, 0.0)[tiles.slot_of]
    return (-of_position / _LOG2_E).reshape(class_.shape)


def _arrange(class_N: jax.Array, num_classes: int) -> _Tiles:
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
    return _Tiles(
        jnp.minimum(class_of_T, num_classes - 1),
        num_used[None].astype(jnp.int32),
        jnp.full(num_slots, num_positions).at[slot_sorted_N].set(order_N, mode="drop"),
        jnp.zeros(num_positions, jnp.int32).at[order_N].set(slot_sorted_N),
    )


def _by_class(weights: Weights, classes: Classes, like: jax.Array) -> _Members:
    padding = -classes.members.shape[1] % LANES
    members_CxR = jnp.pad(classes.members, ((0, 0), (0, padding)), constant_values=-1)
    codes_CxRxM = weights.codes[jnp.maximum(members_CxR, 0)]
    arrays = []
    for x in (weights.scale, weights.bias):
        x = None if x is None else varying_like(x.astype(jnp.float32), like)
        arrays.append(None if x is None else _gather(x, members_CxR, classes)[:, None])
    scale, bias = arrays
    zeros_Cx1xR = jnp.zeros(members_CxR.shape, jnp.float32)[:, None]
    bias = zeros_Cx1xR if bias is None else _LOG2_E * bias
    bias = jnp.where(members_CxR[:, None] < 0, -jnp.inf, bias)
    codes_CxMxR = jnp.moveaxis(codes_CxRxM, -1, 1)
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
def _log2_p(
    static: _Static, l_SxC: jax.Array, members: _Members, tiles: _Tiles, rank_Sx1: jax.Array
) -> jax.Array:
    return _forward(static, l_SxC, members, tiles, rank_Sx1)[0]


def _forward(
    static: _Static, l_SxC: jax.Array, members: _Members, tiles: _Tiles, rank_Sx1: jax.Array
) -> tuple[jax.Array, Any]:
    (log2_p_Sx1,) = _call(
        functools.partial(_forward_kernel, static),
        "vqcx_members_forward",
        static,
        tiles,
        [l_SxC, rank_Sx1],
        members,
        [_Out((len(l_SxC), 1), per_class=False)],
    )
    return log2_p_Sx1[:, 0], (l_SxC, members, tiles, rank_Sx1)


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
        target = jnp.sum(jnp.where(_is_target(z_PxR, rank_ref), z_PxR, 0.0), axis=1, keepdims=True)
        log2_p_ref[...] = target - peak - jnp.log2(total)


def _backward(static: _Static, residuals: Any, g_S: jax.Array) -> tuple[Any, ...]:
    l_SxC, members, tiles, rank_Sx1 = residuals
    num_classes, _, width = members.bias.shape
    per_class = _Out((num_classes, 1, width), per_class=True)
    outs = [_Out(l_SxC.shape, per_class=False), per_class]
    outs += [] if members.scale is None else [per_class]
    d_l_SxC, *d_members = _call(
        functools.partial(_backward_kernel, static),
        "vqcx_members_backward",
        static,
        tiles,
        [l_SxC, rank_Sx1, g_S[:, None]],
        members,
        outs,
    )
    # What no tile has written is whatever was there.
    is_used_S = tiles.position_of < tiles.slot_of.size
    d_l_SxC = jnp.where(is_used_S[:, None], d_l_SxC, 0.0).astype(l_SxC.dtype)
    is_used_T = jnp.arange(len(tiles.class_of)) < tiles.num_used
    occurs_C = jnp.zeros(num_classes, bool).at[tiles.class_of].max(is_used_T)
    d_bias, *d_scale = (jnp.where(occurs_C[:, None, None], d, 0.0) for d in d_members)
    d_all = _Members(None, d_scale[0] if d_scale else None, d_bias)  # type: ignore[arg-type]
    return d_l_SxC, d_all, None, None


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
        d_z_PxR = g_ref[...] * (jnp.where(_is_target(z_PxR, rank_ref), 1.0, 0.0) - p_PxR)
        d_bias_ref[...] += jnp.sum(d_z_PxR, axis=0, keepdims=True)
        if d_scale_ref:
            d_scale_ref[0][...] += jnp.sum(d_z_PxR * sums_PxR, axis=0, keepdims=True)
            d_z_PxR = d_z_PxR * members.scale[...]
        d_l_ref[...] = tpu_tiles.dot(d_z_PxR.astype(l_ref.dtype), s_CxR, transposed=True)


_log2_p.defvjp(_forward, _backward)


class _Out(NamedTuple):
    shape: tuple[int, ...]
    per_class: bool  # Or rows of slots.


def _call(
    kernel: Any,
    name: str,
    static: _Static,
    tiles: _Tiles,
    rows: list[jax.Array],
    members: _Members,
    outs: list[_Out],
) -> list[jax.Array]:
    """One step for each tile: its rows of slots, and the members of its class."""

    def row_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((_ROWS, shape[1]), lambda i, *_: (i, 0))

    def class_spec(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda i, class_of, _: (class_of[i], 0, 0))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=tiles.class_of.shape,
            in_specs=[
                *(row_spec(x.shape) for x in rows),
                jax.tree.map(lambda x: class_spec(x.shape), members),
            ],
            out_specs=[
                class_spec(out.shape) if out.per_class else row_spec(out.shape) for out in outs
            ],
        ),
        out_shape=[out_shape(out.shape, jnp.float32, rows[0]) for out in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=static.interpret,
        name=name,
    )(tiles.class_of, tiles.num_used, *rows, members)


def _is_target(z_PxR: jax.Array, rank_ref: Any) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, z_PxR.shape, 1) == rank_ref[...]
