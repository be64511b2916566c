"""Flash decoding on TPUs: a running softmax over the filled blocks of a KV cache, as a kernel.

What a decoding step costs is reading the cache. Blocks past the last query's key, and before the
window, are neither fetched nor computed. The others are read as they lie in memory, with all key
heads of a position side by side, in one of two views that are the array's own layout on a TPU:

- widths that are multiples of 128: (L, B, S K, D), a row for each position and key head. One
  product gives scores of all query heads with all key heads, and a mask leaves each its own.
- narrower ones, which a TPU stores with positions along lanes: (L, B, K D, S). Queries are zero but
  for the D coordinates of their own key head, and outputs of other heads' values are dropped.

Either way each key enters the matrix unit once, as it would with one product a head: with so few
queries the unit is idle but for that.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.flash_attention.tpu_common import LOG2_E, MASKED, Operand, call, dot
from vqcx_jax.ops.flash_decoding import xla
from vqcx_jax.ops.tpu import LANES, out_shape, up
from vqcx_jax.ops.varying import varying_like

MAX_QUERIES = 16
_MAX_ROWS = 512  # Queries times heads.
_BLOCK_BYTES = 2**20  # Of keys.
_MAX_SCORES = 2**19  # Of a block.


class Settings(NamedTuple):
    """Static facts of one call. block: positions at a time; None: what suits the arrays."""

    scale: float
    window: int | None
    soft_cap: float | None
    block: int | None
    interpret: Any


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    first: jax.Array | int,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    block: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See `api.attend`; k and v are stacked. Weights are rounded to v's dtype; sums are float32.

    Args:
        block: positions of the cache at a time, a multiple of 128; None: the default.
        interpret: Pallas's TPU interpreter, for tests.

    Raises:
        NotSupported: more queries, a width or dtypes that the kernel cannot work with.
    """
    _check(q, k, v)
    settings = Settings(float(scale), window, soft_cap, block, interpret)
    layer, first = (varying_like(jnp.asarray(x, jnp.int32), q) for x in (layer, first))
    if slopes is not None:
        slopes = varying_like(slopes.astype(jnp.float32), q)
    return _attend(settings, q, k, v, layer, first, slopes)


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if q.shape[1] > MAX_QUERIES:
        raise NotSupported(f"q: has {q.shape[1]} positions, must have at most {MAX_QUERIES}")
    if q.shape[1] * q.shape[2] > _MAX_ROWS:
        raise NotSupported(
            f"q: has {q.shape[1]} positions of {q.shape[2]} heads, must have at most {_MAX_ROWS}"
        )
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] % 16:
            raise NotSupported(f"{name}: is {x.shape[-1]} wide, must be a multiple of 16")
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        found = ", ".join(sorted(dtypes))
        raise NotSupported(f"q, k, v: are {found}, must all be bfloat16 or float32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    first: jax.Array,
    slopes: jax.Array | None,
) -> jax.Array:
    return _forward(settings, q, k, v, layer, first, slopes)


def _attend_forward(settings: Settings, *args: Any) -> tuple[jax.Array, Any]:
    return _forward(settings, *args), args


def _attend_backward(settings: Settings, args: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, layer, first, slopes = args

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array | None) -> jax.Array:
        return xla.attend(
            q,
            k,
            v,
            layer,
            first,
            scale=settings.scale,
            window=settings.window,
            soft_cap=settings.soft_cap,
            slopes=slopes,
        )

    d_q, d_k, d_v, d_slopes = jax.vjp(plain, q, k, v, slopes)[1](d_out)
    return d_q, d_k, d_v, None, None, d_slopes


_attend.defvjp(_attend_forward, _attend_backward)


class _View(NamedTuple):
    """How the cache is read.

    in_rows: (L, B, S K, width), else (L, B, K width, S). columns: of a position, in scores.
    block: positions.
    """

    in_rows: bool
    num_kv_heads: int
    block: int

    @property
    def columns(self) -> int:
        """Columns of the scores for each position."""
        return self.num_kv_heads if self.in_rows else 1

    def is_layout_of(self, k: jax.Array, v: jax.Array) -> bool:
        """Do arrays lie so in a TPU's memory, so that the view is no copy?

        The last two axes, here key heads and width, are cut into tiles of 8 x 128, or of as many
        rows as there are if that is 1, 2 or 4.
        """
        widths = {k.shape[-1], v.shape[-1]}
        if not self.in_rows:
            return max(widths) < LANES
        is_tiled = self.num_kv_heads % 8 == 0
        is_flat = self.num_kv_heads in (1, 2, 4) and widths == {LANES}
        return k.shape[2] * self.num_kv_heads % 8 == 0 and (is_tiled or is_flat)

    def operand(self, name: str, x_LxBxSxKxW: jax.Array) -> Operand:
        """The cache and its blocks."""
        *stacked, length, num_kv_heads, width = x_LxBxSxKxW.shape
        if self.in_rows:
            rows = x_LxBxSxKxW.reshape(*stacked, length * num_kv_heads, width)
            block = (None, None, self.block * num_kv_heads, width)
            return Operand(name, rows, block, lambda b, _, s, at: (at[_LAYER], b, _block(at, s), 0))
        lanes = jnp.moveaxis(x_LxBxSxKxW, 2, 4).reshape(*stacked, num_kv_heads * width, length)
        block = (None, None, num_kv_heads * width, self.block)
        return Operand(name, lanes, block, lambda b, _, s, at: (at[_LAYER], b, 0, _block(at, s)))


# Of the scalars that a kernel is given.
_LAYER, _FIRST, _LOW_BLOCK, _HIGH_BLOCK = range(4)


def _block(scalars: Any, step: Any) -> Any:
    """Past the last that is needed, the last again, which is there already."""
    return jnp.minimum(scalars[_LOW_BLOCK] + step, scalars[_HIGH_BLOCK])


def _forward(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    first: jax.Array,
    slopes: jax.Array | None,
) -> jax.Array:
    batch, num_queries, num_heads, width = q.shape
    length, num_kv_heads, value_width = v.shape[2:]
    group = num_heads // num_kv_heads
    num_rows = up(num_queries * num_heads, 16)
    view = _view(settings, num_rows, k, v)
    if not view.is_layout_of(k, v):  # One layer is copied, then, and not all of them.
        k, v = (jax.lax.dynamic_slice_in_dim(x, layer, 1) for x in (k, v))
        layer = jnp.zeros_like(layer)
    # A row for each query and head, and for each of its group's key heads what it reads.
    row = np.arange(num_rows)
    row_query = np.minimum(row // num_heads, num_queries - 1)
    row_head = row % num_heads
    column = np.arange(view.block * view.columns)

    q_BxTxKxGxD = q.reshape(batch, num_queries, num_kv_heads, group, width)
    if not view.in_rows:
        own = jnp.eye(num_kv_heads, dtype=q.dtype)[:, None, :, None]
        q_BxTxKxGxD = q_BxTxKxGxD[..., None, :] * own
    q_BxRxD = q_BxTxKxGxD.reshape(batch, num_queries * num_heads, -1)
    q_BxRxD = jnp.pad(q_BxRxD, ((0, 0), (0, num_rows - q_BxRxD.shape[1]), (0, 0)))
    out_width = value_width if view.in_rows else num_kv_heads * value_width

    def whole(name: str, x: Any) -> Operand:
        return Operand(name, varying_like(jnp.asarray(x), q), x.shape, lambda *_: (0, 0))

    def of_row(b: Any, *_: Any) -> tuple[Any, ...]:
        return b, 0, 0

    inputs = [
        Operand("q", q_BxRxD, (None, *q_BxRxD.shape[1:]), of_row),
        view.operand("k", k),
        view.operand("v", v),
        whole("row_query", row_query.astype(np.int32)[:, None]),
        whole("column_key", (column // view.columns).astype(np.int32)[None]),
    ]
    if view.in_rows and num_kv_heads > 1:
        inputs += [
            whole("row_head", (row_head // group).astype(np.int32)[:, None]),
            whole("column_head", (column % num_kv_heads).astype(np.int32)[None]),
        ]
    if slopes is not None:
        inputs.append(whole("row_slope", LOG2_E * slopes[row_head][:, None]))
    num_blocks = pl.cdiv(length, view.block)
    if settings.window is not None:  # Of any place that it has in the cache.
        seen = settings.window + num_queries - 1
        num_blocks = min(num_blocks, pl.cdiv(seen - 1, view.block) + 1)
    bounds = _bounds(settings, first, num_queries, length, view.block)
    out_BxRxd = call(
        lambda refs: _kernel(refs, settings, view, num_queries, length, num_blocks),
        name="vqcx_flash_decoding",
        grid=(batch, 1, num_blocks),
        tables=[jnp.stack([layer, first, *bounds])],
        inputs=inputs,
        outputs=[
            Operand(
                "out",
                out_shape((batch, num_rows, out_width), q.dtype, q),
                (None, num_rows, out_width),
                of_row,
            )
        ],
        scratch={
            "maximum": pltpu.VMEM((num_rows, 1), jnp.float32),
            "total": pltpu.VMEM((num_rows, 1), jnp.float32),
            "weighted": pltpu.VMEM((num_rows, out_width), jnp.float32),
        },
        interpret=settings.interpret,
    )["out"]
    out = out_BxRxd[:, : num_queries * num_heads]
    if not view.in_rows:
        shape = (batch, num_queries, num_kv_heads, group, num_kv_heads, value_width)
        out = jnp.einsum("btkgkd->btkgd", out.reshape(shape))
    return out.reshape(batch, num_queries, num_heads, value_width)


def _view(settings: Settings, num_rows: int, k: jax.Array, v: jax.Array) -> _View:
    length, num_kv_heads, width = k.shape[2:]
    in_rows = width % LANES == 0 and v.shape[-1] % LANES == 0
    block = settings.block
    if block is None:
        columns = num_kv_heads if in_rows else 1
        bytes_of_position = num_kv_heads * max(width, v.shape[-1]) * k.dtype.itemsize
        block = min(_BLOCK_BYTES // bytes_of_position, _MAX_SCORES // (num_rows * columns))
        block = max(block // LANES, 1) * LANES
    return _View(in_rows, num_kv_heads, min(block, length))


def _bounds(
    settings: Settings, first: jax.Array, num_queries: int, length: int, block: int
) -> tuple[jax.Array, jax.Array]:
    """The first and the last block that a query sees."""
    high = (jnp.minimum(first + num_queries, length) - 1) // block
    low = jnp.zeros_like(first)
    if settings.window is not None:
        low = jnp.minimum(jnp.maximum(first - settings.window + 1, 0) // block, high)
    return low, high


def _kernel(
    refs: dict[str, Any],
    settings: Settings,
    view: _View,
    num_queries: int,
    length: int,
    num_blocks: int,
) -> None:
    (scalars,) = refs["tables"]
    step, first = pl.program_id(2), scalars[_FIRST]
    block = scalars[_LOW_BLOCK] + step
    start = block * view.block

    @pl.when(step == 0)
    def begin() -> None:
        refs["maximum"][...] = jnp.full_like(refs["maximum"], MASKED)
        refs["total"][...] = jnp.zeros_like(refs["total"])
        refs["weighted"][...] = jnp.zeros_like(refs["weighted"])

    # Keys that all queries see need no mask by position.
    is_seen_by_all = start + view.block <= first + 1
    if settings.window is not None:
        is_seen_by_all &= start >= first + num_queries - settings.window

    @pl.when((block <= scalars[_HIGH_BLOCK]) & is_seen_by_all)
    def inner() -> None:
        _tile(refs, settings, view, start, None)

    @pl.when((block <= scalars[_HIGH_BLOCK]) & ~is_seen_by_all)
    def edge() -> None:
        _tile(refs, settings, view, start, jnp.minimum(first + num_queries, length))

    @pl.when(step == num_blocks - 1)
    def finish() -> None:
        out = refs["weighted"][...] / refs["total"][...]
        refs["out"][...] = out.astype(refs["out"].dtype)


def _tile(
    refs: dict[str, Any], settings: Settings, view: _View, start: Any, end: Any | None
) -> None:
    """One block, beginning at position `start`; of an edge, `end` positions of the cache count."""
    # Of columns and rows: the index of a key less that of the query.
    key_minus_query = start - refs["tables"][0][_FIRST] + refs["column_key"][...]
    key_minus_query = key_minus_query - refs["row_query"][...]
    scores = dot(refs["q"][...], refs["k"][...], (1, 1 if view.in_rows else 0))
    if settings.soft_cap is None:
        scores = (settings.scale * LOG2_E) * scores
    else:
        capped = jnp.tanh((settings.scale / settings.soft_cap) * scores)
        scores = (settings.soft_cap * LOG2_E) * capped
    if "row_slope" in refs:
        scores += refs["row_slope"][...] * key_minus_query.astype(jnp.float32)
    shown = []
    if "row_head" in refs:
        shown.append(refs["row_head"][...] == refs["column_head"][...])
    values = refs["v"][...]
    if end is not None:
        shown.append(key_minus_query <= 0)
        if settings.window is not None:
            shown.append(key_minus_query > -settings.window)
        # A weight of 0 does not hide what is not a number: values of no query, and of no position.
        index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0 if view.in_rows else 1)
        wide = values.astype(jnp.float32)
        is_value = index < (end - start) * view.columns
        values = jnp.where(is_value, wide, 0.0).astype(values.dtype)
    if shown:
        scores = jnp.where(functools.reduce(jnp.logical_and, shown), scores, MASKED)
    previous = refs["maximum"][...]
    maximum = jnp.maximum(previous, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - maximum)
    shrink = jnp.exp2(previous - maximum)
    refs["maximum"][...] = maximum
    refs["total"][...] = shrink * refs["total"][...] + jnp.sum(weights, axis=1, keepdims=True)
    refs["weighted"][...] = shrink * refs["weighted"][...] + dot(
        weights.astype(values.dtype), values, (1, 0 if view.in_rows else 1)
    )
