"""What the forward and the backward kernel share: settings, operands, scores."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops.attention.phase import position_angle
from vqcx_jax.ops.attention.trig import cos_sin
from vqcx_jax.ops.flash_attention.amplitude import Amplitude, num_planes
from vqcx_jax.ops.flash_attention.block_sizes import BlockSizes
from vqcx_jax.ops.flash_attention.tiles import KIND_SHIFT, Kind, Plan, Visible
from vqcx_jax.ops.flash_attention.transform import Planes
from vqcx_jax.ops.tpu import LANES, VMEM_LIMIT

LOG2_E = 1.4426950408889634
# Of masked scores: finite, so that differences of two are not NaN.
MASKED = -1e30


class Settings(NamedTuple):
    """Static facts of one call.

    has_table: whether cosines and sines of positions come from outside, made once for all heads;
    else kernels make them of positions and frequencies.
    """

    scale: float
    soft_cap: float | None
    visible: Visible
    blocks: BlockSizes
    amplitude: Amplitude | None
    has_table: bool
    interpret: Any

    def num_planes(self, width: int) -> int:
        """P, of heads of this width."""
        return num_planes(width, self.amplitude)

    @property
    def query_scale(self) -> float:
        """Folded into turned queries: scores come out in powers of 2, or as tanh's argument."""
        return self.scale * LOG2_E if self.soft_cap is None else self.scale / self.soft_cap


class Inputs(NamedTuple):
    """Arrays of one call; B batch, H query heads, K key heads, T positions, P planes.

    q (B, H, T, d), k (B, K, T, d), v (B, K, T, dv); positions, segment_ids int32 (B, 1, T);
    omega, delta float32 (K, P, 1), bias float32 (H, P, 1).
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None
    omega: jax.Array
    delta: jax.Array | None
    bias: jax.Array | None


class Operand(NamedTuple):
    """An input or output of a kernel, by name."""

    name: str
    value: Any
    block: tuple[int | None, ...]
    index_map: Callable[..., tuple[Any, ...]]

    @property
    def spec(self) -> pl.BlockSpec:
        """Its BlockSpec."""
        return pl.BlockSpec(self.block, self.index_map)


def call(
    kernel: Callable[[dict[str, Any]], None],
    name: str,
    grid: tuple[int, int, int],
    tables: Sequence[Any],
    inputs: Sequence[Operand],
    outputs: Sequence[Operand],
    scratch: dict[str, Any],
    interpret: Any,
) -> dict[str, jax.Array]:
    """A pallas_call whose kernel gets its references by name; the first grid axis is parallel."""
    names = [operand.name for operand in (*inputs, *outputs)] + list(scratch)

    def body(*refs: Any) -> None:
        kernel(dict(zip(names, refs[len(tables) :], strict=True)) | {"tables": refs[: len(tables)]})

    results = pl.pallas_call(
        body,
        name=name,
        out_shape=[operand.value for operand in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=[operand.spec for operand in inputs],
            out_specs=[operand.spec for operand in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
    )(*tables, *(operand.value for operand in inputs))
    return dict(zip([operand.name for operand in outputs], results, strict=True))


class Indices(NamedTuple):
    """Of arrays' heads, from the grid: n counts batch and key heads, g the queries' group."""

    num_kv_heads: int
    group: int

    def batch(self, n: Any) -> Any:
        """Row of the batch."""
        return jax.lax.div(n, self.num_kv_heads)

    def kv_head(self, n: Any) -> Any:
        """Key head."""
        return jax.lax.rem(n, self.num_kv_heads)

    def head(self, n: Any, g: Any) -> Any:
        """Query head."""
        return self.kv_head(n) * self.group + g

    def where_meeting(self, meeting: Sequence[Any]) -> Callable[[Callable[[], None]], None]:
        """Runs a function if `meeting_tiles`, where there is such a table, has the tile at hand."""
        if not meeting:
            return lambda body: body()
        batch, step = self.batch(pl.program_id(0)), pl.program_id(2)
        return pl.when(meeting[0][batch, step] != 0)

    # Index maps of operands whose blocks go by the query block of a step, tables[0].

    def of_queries(self, n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        """(B, H, T, width)."""
        return self.batch(n), self.head(n, g), tables[0][s], 0

    def of_query_row(self, n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        """(B, 1, T)."""
        return self.batch(n), 0, tables[0][s]

    def of_lse(self, n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        """(B, H, 1, T)."""
        return self.batch(n), self.head(n, g), 0, tables[0][s]

    # And of those that a head has.

    def of_kv_head(self, n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        """(K, P, 1)."""
        return self.kv_head(n), 0, 0

    def of_head(self, n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        """(H, P, 1)."""
        return self.head(n, g), 0, 0


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Product of matrices, accumulated in float32; float32 ones at full precision."""
    is_wide = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if is_wide else None,
        preferred_element_type=jnp.float32,
    )


def phase_operands(
    inputs: Inputs, settings: Settings, at: Indices, block_q: int, block_kv: int, of_key_row: Any
) -> list[Operand]:
    """What phases are made of, but for positions: parameters of the head at hand, or the table.

    Args:
        of_key_row: index map of the keys that are turned, of arrays (B, 1, T).
    """
    num_planes = settings.num_planes(inputs.q.shape[-1])
    block = (None, num_planes, 1)
    if not settings.has_table:
        operands = [Operand("omega", inputs.omega, block, at.of_kv_head)]
        if inputs.delta is not None:
            operands.append(Operand("delta", inputs.delta, block, at.of_kv_head))
        if inputs.bias is not None:
            operands.append(Operand("bias", inputs.bias, block, at.of_head))
        return operands
    angle = position_angle(inputs.positions.astype(jnp.float32), inputs.omega[0])
    operands = []
    for name, x in zip(("cos", "sin"), cos_sin(angle), strict=True):
        operands += [
            Operand(f"q_position_{name}", x, (None, num_planes, block_q), at.of_query_row),
            Operand(f"k_position_{name}", x, (None, num_planes, block_kv), of_key_row),
        ]
    if inputs.bias is not None:
        for name, x in zip(("cos", "sin"), cos_sin(inputs.bias), strict=True):
            operands.append(Operand(f"bias_{name}", x, block, at.of_head))
    return operands


def planes_of(refs: dict[str, Any], settings: Settings, with_bias: bool) -> Planes:
    """The parameters of the head at hand; keys have no bias."""
    omega, delta, bias = (
        refs[name][...] if name in refs else None for name in ("omega", "delta", "bias")
    )
    bias_turn = None
    if with_bias and "bias_cos" in refs:
        bias_turn = refs["bias_cos"][...], refs["bias_sin"][...]
    return Planes(omega, delta, bias if with_bias else None, settings.amplitude, bias_turn)


def positions_of(refs: dict[str, Any], of: str, at: Any) -> Any:
    """Of queries ("q") or keys ("k"), as `turned` takes them."""
    if f"{of}_position_cos" in refs:
        return refs[f"{of}_position_cos"][:, at], refs[f"{of}_position_sin"][:, at]
    return refs[f"{of}_positions"][:, at]


def for_chunks(size: int, body: Callable[[Any], None]) -> None:
    """body(slice) for 256 positions at a time, or 128: enough at once to hide latencies."""
    width = math.gcd(size, 2 * LANES)

    def step(index: jax.Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(index * width, width), width))

    jax.lax.fori_loop(0, size // width, step, None)


def column(row: jax.Array) -> jax.Array:
    """(1, n) to (n, LANES), every lane the same."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


class Rectangle(NamedTuple):
    """A part of a tile that is worked on at once."""

    first_query: int
    num_queries: int
    first_key: int
    num_keys: int

    @property
    def queries(self) -> slice:
        """Within the tile."""
        return slice(self.first_query, self.first_query + self.num_queries)

    @property
    def keys(self) -> slice:
        """Within the tile."""
        return slice(self.first_key, self.first_key + self.num_keys)

    def hidden(self, kind: Kind, visible: Visible) -> tuple[bool, bool]:
        """Is some of it hidden, is all of it?"""
        return kind.hides(visible, *self)


def strips_of_queries(
    kind: Kind, visible: Visible, block_q: int, block_kv: int, width: int
) -> list[Rectangle]:
    """The tile cut into strips of `width` queries, each with the range of keys that it sees."""
    strips = []
    for query in range(0, block_q, width):
        seen = [
            key
            for key in range(0, block_kv, LANES)
            if not kind.hides(visible, query, width, key, LANES)[1]
        ]
        if seen:
            strips.append(Rectangle(query, width, seen[0], seen[-1] + LANES - seen[0]))
    return strips


def strips_of_keys(
    kind: Kind, visible: Visible, block_q: int, block_kv: int, width: int
) -> list[Rectangle]:
    """The tile cut into strips of `width` keys, each with the range of queries that see it."""
    strips = []
    for key in range(0, block_kv, width):
        seeing = [
            query
            for query in range(0, block_q, LANES)
            if not kind.hides(visible, query, LANES, key, width)[1]
        ]
        if seeing:
            strips.append(Rectangle(seeing[0], seeing[-1] + LANES - seeing[0], key, width))
    return strips


def masked(
    scores: jax.Array,
    at: Rectangle,
    kind: Kind,
    visible: Visible,
    query_axis: int,
    same_segment: jax.Array | None,
) -> jax.Array:
    """Scores with MASKED where the key is hidden from the query; `query_axis` is that of queries.

    Lanes that show all are left alone.
    """
    if same_segment is not None:
        scores = jnp.where(same_segment, scores, MASKED)
    parts = []
    for start in range(0, scores.shape[1], LANES):
        part = scores[:, start : start + LANES]
        if query_axis == 0:
            within = at._replace(first_key=at.first_key + start, num_keys=LANES)
        else:
            within = at._replace(first_query=at.first_query + start, num_queries=LANES)
        if within.hidden(kind, visible)[0]:
            iota = jax.lax.broadcasted_iota
            query = within.first_query + iota(jnp.int32, part.shape, query_axis)
            key = within.first_key + iota(jnp.int32, part.shape, 1 - query_axis)
            shown = []
            if kind.offset is not None and visible.low is not None:
                shown.append(query - key >= visible.low + kind.offset)
            if kind.offset is not None and visible.high is not None:
                shown.append(query - key <= visible.high + kind.offset)
            if kind.limit is not None:
                shown.append(key < kind.limit)
            part = jnp.where(functools.reduce(jnp.logical_and, shown), part, MASKED)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def meeting_tiles(
    segment_ids: jax.Array, plan: Plan, block_q: int, block_kv: int, first_key_block: int = 0
) -> jax.Array:
    """1 for each tile of the plan in which a query and a key may be of one segment, else 0.

    Judged by the least and the largest id of 128 positions at a time: where ids rise along a row,
    as in packed documents, few tiles are taken in vain.

    Args:
        segment_ids: int32 (B, 1, T). first_key_block: where the plan's key blocks begin.

    Returns:
        int32 (B, steps).
    """
    ids_BxCxL = segment_ids.reshape(len(segment_ids), -1, LANES)
    least, largest = jnp.min(ids_BxCxL, axis=-1), jnp.max(ids_BxCxL, axis=-1)
    meet_BxQxK = (least[:, :, None] <= largest[:, None]) & (least[:, None] <= largest[:, :, None])
    num_q, num_kv = (least.shape[1] * LANES // block for block in (block_q, block_kv))
    tiles = (len(segment_ids), num_q, block_q // LANES, num_kv, block_kv // LANES)
    any_meet = jnp.any(meet_BxQxK.reshape(tiles), axis=(2, 4))
    return any_meet[:, plan.q_block, plan.k_block + first_key_block].astype(jnp.int32)


def for_kinds(plan: Plan, code: jax.Array, body: Callable[[Kind], None]) -> None:
    """body(kind) for the kind of the tile at hand; one branch each."""
    if len(plan.kinds) == 1:
        body(plan.kinds[0])
        return
    for index, kind in enumerate(plan.kinds):
        pl.when(code >> KIND_SHIFT == index)(functools.partial(body, kind))
