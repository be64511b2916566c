"""The forward kernel: one pass over the tiles of a query block with a running softmax.

Turned keys, and values, stay in VMEM from their first use to the last query head that reads them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops.flash_attention.tiles import (
    FIRST_OF_ROW,
    LAST_OF_ROW,
    NEW_KEY,
    Kind,
    Plan,
    make_plan,
)
from vqcx_jax.ops.flash_attention.tpu_common import (
    LOG2_E,
    MASKED,
    Indices,
    Inputs,
    Operand,
    Rectangle,
    Settings,
    call,
    column,
    dot,
    for_chunks,
    for_kinds,
    masked,
    meeting_tiles,
    phase_operands,
    planes_of,
    positions_of,
    strips_of_queries,
)
from vqcx_jax.ops.flash_attention.transform import turned
from vqcx_jax.ops.tpu import LANES, out_shape


def forward(inputs: Inputs, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Attention and the logarithms, to base 2, of the softmax's sums.

    Returns:
        (B, H, T, dv) in q's dtype, float32 (B, H, 1, T). T is a multiple of both blocks.
    """
    q, k, v, *_ = inputs
    batch, num_heads, length, width = q.shape
    num_kv_heads, value_width = v.shape[1], v.shape[-1]
    group = num_heads // num_kv_heads
    block_q, block_kv = settings.blocks.block_q, settings.blocks.block_kv
    num_key_blocks = length // block_kv
    num_planes = settings.num_planes(width)
    turned_width = 2 * num_planes
    bytes_of_key = turned_width * k.dtype.itemsize + value_width * v.dtype.itemsize
    is_cached = length * bytes_of_key <= settings.blocks.cached_keys * 4 * LANES
    plan = make_plan(settings.visible, length, block_q, block_kv, range(num_key_blocks))
    fetch = plan.first_fetch if is_cached else plan.k_block

    def fetched(g: Any, s: Any, tables: Any) -> Any:
        here = tables[2][s]
        return jnp.where(g == 0, here, int(fetch[-1])) if is_cached and group > 1 else here

    at = Indices(num_kv_heads, group)

    def of_keys(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), at.kv_head(n), fetched(g, s, tables), 0

    def of_fetched_row(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), 0, fetched(g, s, tables)

    def of_key_row(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), 0, tables[1][s]

    operands = [
        Operand("q", q, (None, None, block_q, width), at.of_queries),
        Operand("k", k, (None, None, block_kv, width), of_keys),
        Operand("v", v, (None, None, block_kv, value_width), of_keys),
        *phase_operands(inputs, settings, at, block_q, block_kv, of_fetched_row),
    ]
    if not settings.has_table:
        operands += [
            Operand("q_positions", inputs.positions, (None, 1, block_q), at.of_query_row),
            Operand("k_positions", inputs.positions, (None, 1, block_kv), of_fetched_row),
        ]
    has_segments = inputs.segment_ids is not None
    if has_segments:
        operands += [
            Operand("q_segments", inputs.segment_ids, (None, 1, block_q), at.of_query_row),
            Operand("k_segments", inputs.segment_ids, (None, 1, block_kv), of_key_row),
        ]
    meeting = []
    if inputs.segment_ids is not None:
        meeting = [meeting_tiles(inputs.segment_ids, plan, block_q, block_kv)]
    cached_blocks = num_key_blocks if is_cached else 1
    results = call(
        lambda refs: _kernel(refs, plan, settings, is_cached, at),
        name="vqcx_flash_fwd",
        grid=(batch * num_kv_heads, group, plan.num_steps),
        tables=[plan.q_block, plan.k_block, fetch, plan.code, *meeting],
        inputs=operands,
        outputs=[
            Operand(
                "out",
                out_shape((batch, num_heads, length, value_width), q.dtype, q),
                (None, None, block_q, value_width),
                at.of_queries,
            ),
            Operand(
                "lse",
                out_shape((batch, num_heads, 1, length), jnp.float32, q),
                (None, None, 1, block_q),
                at.of_lse,
            ),
        ],
        scratch={
            "turned_q": pltpu.VMEM((block_q, turned_width), q.dtype),
            "turned_k": pltpu.VMEM((cached_blocks, block_kv, turned_width), k.dtype),
            "values": pltpu.VMEM((cached_blocks, block_kv, value_width), v.dtype),
            "maximum": pltpu.VMEM((block_q, LANES), jnp.float32),
            "total": pltpu.VMEM((block_q, LANES), jnp.float32),
            "weighted": pltpu.VMEM((block_q, value_width), jnp.float32),
            "q_column": pltpu.VMEM((block_q if has_segments else 8, LANES), jnp.int32),
        },
        interpret=settings.interpret,
    )
    return results["out"], results["lse"]


def _kernel(
    refs: dict[str, Any], plan: Plan, settings: Settings, is_cached: bool, indices: Indices
) -> None:
    group_index, step = pl.program_id(1), pl.program_id(2)
    _, k_block_ref, _, code_ref, *meeting = refs["tables"]
    code = code_ref[step]
    block_q, block_kv = settings.blocks.block_q, settings.blocks.block_kv
    slot = k_block_ref[step] if is_cached else 0

    @pl.when(code & FIRST_OF_ROW != 0)
    def start_row() -> None:
        refs["maximum"][...] = jnp.full_like(refs["maximum"], MASKED)
        refs["total"][...] = jnp.zeros_like(refs["total"])
        refs["weighted"][...] = jnp.zeros_like(refs["weighted"])
        planes = planes_of(refs, settings, with_bias=True)

        def turn(at: Any) -> None:
            x = refs["q"][at, :].astype(jnp.float32).T
            y, _ = turned(x, positions_of(refs, "q", at), planes, settings.query_scale)
            refs["turned_q"][at, :] = y.T.astype(refs["turned_q"].dtype)
            if "q_segments" in refs:
                refs["q_column"][at, :] = column(refs["q_segments"][:, at])

        for_chunks(block_q, turn)

    def take_keys() -> None:
        refs["values"][slot] = refs["v"][...]
        planes = planes_of(refs, settings, with_bias=False)

        def turn(at: Any) -> None:
            x = refs["k"][at, :].astype(jnp.float32).T
            y, _ = turned(x, positions_of(refs, "k", at), planes)
            refs["turned_k"][slot, at, :] = y.T.astype(refs["turned_k"].dtype)

        for_chunks(block_kv, turn)

    if is_cached:
        pl.when((code & NEW_KEY != 0) & (group_index == 0))(take_keys)
    else:
        take_keys()

    @indices.where_meeting(meeting)
    def tile() -> None:
        for_kinds(plan, code, lambda kind: _tile(refs, kind, settings, slot))

    @pl.when(code & LAST_OF_ROW != 0)
    def finish_row() -> None:
        def write(at: Any) -> None:
            total = jnp.sum(refs["total"][at, :], axis=1, keepdims=True)
            refs["out"][at, :] = (refs["weighted"][at, :] / total).astype(refs["out"].dtype)
            lse = refs["maximum"][at, :] + jnp.log2(total)
            refs["lse"][:, at] = lse.T[:1]

        for_chunks(block_q, write)


def _tile(refs: dict[str, Any], kind: Kind, settings: Settings, slot: Any) -> None:
    blocks = settings.blocks
    strips = strips_of_queries(
        kind, settings.visible, blocks.block_q, blocks.block_kv, blocks.sub_q
    )

    def scores_of(at: Rectangle) -> jax.Array:
        return dot(refs["turned_q"][at.queries], refs["turned_k"][slot, at.keys], (1, 1))

    if not strips:
        return
    # The next strip's scores are asked for before this strip's softmax, so that the compiler finds
    # matrix and vector work to overlap.
    upcoming = scores_of(strips[0])
    for index, at in enumerate(strips):
        scores = upcoming
        if index + 1 < len(strips):
            upcoming = scores_of(strips[index + 1])
        if settings.soft_cap is not None:
            scores = (settings.soft_cap * LOG2_E) * jnp.tanh(scores)
        same_segment = None
        if "q_segments" in refs:
            ids = _lanes(refs["q_column"][at.queries], at.num_keys)
            same_segment = ids == refs["k_segments"][:, at.keys]
        scores = masked(scores, at, kind, settings.visible, 0, same_segment)
        previous = refs["maximum"][at.queries]
        maximum = jnp.maximum(previous, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - _lanes(maximum, at.num_keys))
        shrink = jnp.exp2(previous - maximum)
        # Sums of every 128th key: across lanes they are added once, at the end of the row.
        total = shrink * refs["total"][at.queries]
        for start in range(0, at.num_keys, LANES):
            total += weights[:, start : start + LANES]
        refs["maximum"][at.queries] = maximum
        refs["total"][at.queries] = total
        values = refs["values"][slot, at.keys]
        refs["weighted"][at.queries] = _lanes(shrink, values.shape[1]) * refs["weighted"][
            at.queries
        ] + dot(weights.astype(values.dtype), values)


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """(n, LANES), every lane the same, as (n, width)."""
    return jnp.tile(x, (1, pl.cdiv(width, LANES)))[:, :width]
