"""The backward kernel: all gradients in one pass, five matrix products for each tile.

Scores are kept transposed, keys along sublanes and queries along lanes, so that four of the five
products need no transpose; the fifth, of turned queries' gradients, is d q'^T = k'^T d s^T. The
gradients of a key head stay in VMEM, float32, until the last query head has added to them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops.attention.polar import Turn
from vqcx_jax.ops.flash_attention.tiles import (
    FIRST_OF_ROW,
    LAST_OF_KEY,
    LAST_OF_ROW,
    NEW_KEY,
    Kind,
    Plan,
    make_plan,
)
from vqcx_jax.ops.flash_attention.tpu_common import (
    LOG2_E,
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
    strips_of_keys,
)
from vqcx_jax.ops.flash_attention.transform import (
    PhaseGradients,
    pull_back,
    turned,
)
from vqcx_jax.ops.tpu import LANES, out_shape

PHASES = Turn._fields


def backward(
    inputs: Inputs, settings: Settings, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> dict[str, jax.Array]:
    """Gradients by q, k, v, omega, delta and bias, under these names.

    Those by q, k and v have the shapes and dtypes of these, the others are float32 (B, K, P), and
    (B, H, P) for bias: the sum over B is left.
    """
    length, block_kv = inputs.q.shape[2], settings.blocks.block_kv_backward
    num_blocks = length // block_kv
    turned_width = 2 * settings.num_planes(inputs.q.shape[-1])
    widest = max(turned_width, inputs.v.shape[-1], LANES)
    chunk_blocks = max(1, settings.blocks.chunk_keys * LANES // (widest * block_kv))
    parts = [
        _chunk(
            inputs, settings, out, lse, d_out, range(start, min(start + chunk_blocks, num_blocks))
        )
        for start in range(0, num_blocks, chunk_blocks)
    ]
    gradients = {
        name: functools.reduce(jnp.add, [part[name] for part in parts])
        for name in parts[0]
        if name not in ("k", "v")
    }
    gradients |= {
        name: jnp.concatenate([part[name] for part in parts], axis=2) for name in ("k", "v")
    }
    return gradients | {"q": gradients["q"].astype(inputs.q.dtype)}


def _chunk(
    inputs: Inputs,
    settings: Settings,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    key_blocks: range,
) -> dict[str, jax.Array]:
    """As `backward`, as far as these key blocks bring it about."""
    q, k, v, *_ = inputs
    batch, num_heads, length, width = q.shape
    num_kv_heads, value_width = v.shape[1], v.shape[-1]
    group = num_heads // num_kv_heads
    block_q, block_kv = settings.blocks.block_q_backward, settings.blocks.block_kv_backward
    num_blocks = len(key_blocks)
    plan = make_plan(settings.visible, length, block_q, block_kv, key_blocks)
    at = Indices(num_kv_heads, group)
    start = key_blocks.start

    def by_pass(g: Any, only: Any, first: Any, middle: Any, last: Any) -> Any:
        """What holds for the first, the last and other query heads of a group, or its only one."""
        if group == 1:
            return only
        return jnp.where(g == 0, first, jnp.where(g == group - 1, last, middle))

    def key_block(g: Any, s: Any, tables: Any) -> Any:
        middle = int(plan.first_fetch[-1])
        return by_pass(g, tables[4][s], tables[2][s], middle, tables[3][s])

    def value_block(g: Any, s: Any, tables: Any) -> Any:
        first, rest = tables[2][s], int(plan.first_fetch[-1])
        return by_pass(g, first, first, rest, rest)

    def written_block(g: Any, s: Any, tables: Any) -> Any:
        before, last = int(plan.last_fetch[0]), tables[3][s]
        return by_pass(g, last, before, before, last)

    def of_keys(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), at.kv_head(n), start + key_block(g, s, tables), 0

    def of_values(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), at.kv_head(n), start + value_block(g, s, tables), 0

    def of_written(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), at.kv_head(n), written_block(g, s, tables), 0

    def of_fetched_row(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), 0, start + key_block(g, s, tables)

    def of_key_row(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), 0, start + tables[1][s]

    def of_summed_kv_head(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), at.kv_head(n), 0, 0

    def of_summed_head(n: Any, g: Any, s: Any, *tables: Any) -> tuple[Any, ...]:
        return at.batch(n), at.head(n, g), 0, 0

    num_planes = settings.num_planes(width)
    turned_width = 2 * num_planes
    query_block, value_query_block = (
        (None, None, block_q, width),
        (None, None, block_q, value_width),
    )
    key_shape, value_shape = (None, None, block_kv, width), (None, None, block_kv, value_width)
    operands = [
        Operand("q", q, query_block, at.of_queries),
        Operand("k", k, key_shape, of_keys),
        Operand("v", v, value_shape, of_values),
        Operand("out", out, value_query_block, at.of_queries),
        Operand("d_out", d_out, value_query_block, at.of_queries),
        Operand("lse", lse, (None, None, 1, block_q), at.of_lse),
        Operand("q_positions", inputs.positions, (None, 1, block_q), at.of_query_row),
        Operand("k_positions", inputs.positions, (None, 1, block_kv), of_fetched_row),
        *phase_operands(inputs, settings, at, block_q, block_kv, of_fetched_row),
    ]
    if inputs.segment_ids is not None:
        operands += [
            Operand("q_segments", inputs.segment_ids, (None, 1, block_q), at.of_query_row),
            Operand("k_segments", inputs.segment_ids, (None, 1, block_kv), of_key_row),
        ]
    meeting = []
    if inputs.segment_ids is not None:
        meeting = [meeting_tiles(inputs.segment_ids, plan, block_q, block_kv, start)]
    is_whole = length == num_blocks * block_kv
    d_q = out_shape(q.shape, q.dtype if is_whole else jnp.float32, q)
    d_k = out_shape((batch, num_kv_heads, num_blocks * block_kv, width), k.dtype, k)
    d_v = out_shape((batch, num_kv_heads, num_blocks * block_kv, value_width), v.dtype, v)
    summed = (None, None, num_planes, LANES)
    of_each_kv_head = out_shape((batch, num_kv_heads, num_planes, LANES), jnp.float32, q)
    of_each_head = out_shape((batch, num_heads, num_planes, LANES), jnp.float32, q)
    outputs = [
        Operand("d_q", d_q, query_block, at.of_queries),
        Operand("d_k", d_k, key_shape, of_written),
        Operand("d_v", d_v, value_shape, of_written),
        Operand("d_omega", of_each_kv_head, summed, of_summed_kv_head),
    ]
    if inputs.delta is not None:
        outputs.append(Operand("d_delta", of_each_kv_head, summed, of_summed_kv_head))
    if inputs.bias is not None:
        outputs.append(Operand("d_bias", of_each_head, summed, of_summed_head))
    phases = {}
    for name in PHASES if inputs.delta is not None else ("cos", "sin"):
        phases[f"q_{name}"] = pltpu.VMEM((num_planes, block_q), jnp.float32)
        phases[f"k_{name}"] = pltpu.VMEM((num_blocks, num_planes, block_kv), jnp.float32)
    results = call(
        lambda refs: _kernel(refs, plan, settings, at),
        name="vqcx_flash_bwd",
        grid=(batch * num_kv_heads, group, plan.num_steps),
        tables=[
            plan.q_block,
            plan.k_block,
            plan.first_fetch,
            plan.last_fetch,
            plan.both_fetch,
            plan.code,
            *meeting,
        ],
        inputs=operands,
        outputs=outputs,
        scratch={
            "turned_q": pltpu.VMEM((block_q, turned_width), q.dtype),
            "dot_out": pltpu.VMEM((1, block_q), jnp.float32),
            "d_turned_q": pltpu.VMEM((turned_width, block_q), jnp.float32),
            "turned_k": pltpu.VMEM((num_blocks, block_kv, turned_width), k.dtype),
            "turned_k_transposed": pltpu.VMEM((num_blocks, turned_width, block_kv), k.dtype),
            "values": pltpu.VMEM((num_blocks, block_kv, value_width), v.dtype),
            "d_turned_k": pltpu.VMEM((num_blocks, block_kv, turned_width), jnp.float32),
            "d_values": pltpu.VMEM((num_blocks, block_kv, value_width), jnp.float32),
        }
        | phases,
        interpret=settings.interpret,
    )
    return {
        name.removeprefix("d_"): jnp.sum(x, axis=-1)
        if name in ("d_omega", "d_delta", "d_bias")
        else x
        for name, x in results.items()
    }


def _stored_turn(refs: dict[str, Any], of: str, at: tuple[Any, ...]) -> Turn:
    theta = refs[f"{of}_theta"][at] if f"{of}_theta" in refs else None
    return Turn(refs[f"{of}_cos"][at], refs[f"{of}_sin"][at], theta)


def _add_phase_gradients(refs: dict[str, Any], of_phase: PhaseGradients, with_bias: bool) -> None:
    _add(refs["d_omega"], of_phase.omega)
    if of_phase.delta is not None:
        _add(refs["d_delta"], of_phase.delta)
    if with_bias and "d_bias" in refs:
        _add(refs["d_bias"], of_phase.bias)


def _add(total_ref: Any, terms: jax.Array) -> None:
    """Adds (P, n) to (P, LANES): every LANES-th position."""
    for start in range(0, terms.shape[1], LANES):
        total_ref[...] += terms[:, start : start + LANES]


def _kernel(refs: dict[str, Any], plan: Plan, settings: Settings, indices: Indices) -> None:
    group_index, step = pl.program_id(1), pl.program_id(2)
    _, k_block_ref, _, _, _, code_ref, *meeting = refs["tables"]
    code, slot = code_ref[step], k_block_ref[step]
    block_q, block_kv = settings.blocks.block_q_backward, settings.blocks.block_kv_backward
    float32 = jnp.float32

    @pl.when(step == 0)
    def start_head() -> None:
        if "d_bias" in refs:
            refs["d_bias"][...] = jnp.zeros_like(refs["d_bias"])

    @pl.when((step == 0) & (group_index == 0))
    def start_kv_head() -> None:
        for name in ("d_omega", "d_delta"):
            if name in refs:
                refs[name][...] = jnp.zeros_like(refs[name])

    @pl.when((code & NEW_KEY != 0) & (group_index == 0))
    def take_keys() -> None:
        refs["values"][slot] = refs["v"][...]
        refs["d_turned_k"][slot] = jnp.zeros(refs["d_turned_k"].shape[1:], float32)
        refs["d_values"][slot] = jnp.zeros(refs["d_values"].shape[1:], float32)
        planes = planes_of(refs, settings, with_bias=False)

        def take(at: Any) -> None:
            x = refs["k"][at, :].astype(float32).T
            y, turn = turned(x, positions_of(refs, "k", at), planes)
            for name, phase in zip(PHASES, turn, strict=True):
                if phase is not None:
                    refs[f"k_{name}"][slot, :, at] = phase
            refs["turned_k_transposed"][slot, :, at] = y.astype(refs["turned_k"].dtype)
            refs["turned_k"][slot, at, :] = y.T.astype(refs["turned_k"].dtype)

        for_chunks(block_kv, take)

    @pl.when(code & FIRST_OF_ROW != 0)
    def start_row() -> None:
        refs["d_turned_q"][...] = jnp.zeros_like(refs["d_turned_q"])
        planes = planes_of(refs, settings, with_bias=True)

        def take(at: Any) -> None:
            x = refs["q"][at, :].astype(float32).T
            y, turn = turned(x, positions_of(refs, "q", at), planes, settings.query_scale)
            for name, phase in zip(PHASES, turn, strict=True):
                if phase is not None:
                    refs[f"q_{name}"][:, at] = phase
            refs["turned_q"][at, :] = y.T.astype(refs["turned_q"].dtype)
            product = refs["out"][at, :].astype(float32) * refs["d_out"][at, :].astype(float32)
            refs["dot_out"][:, at] = jnp.sum(product.T, axis=0, keepdims=True)

        for_chunks(block_q, take)

    @indices.where_meeting(meeting)
    def tile() -> None:
        for_kinds(plan, code, lambda kind: _tile(refs, kind, settings, slot))

    @pl.when(code & LAST_OF_ROW != 0)
    def finish_row() -> None:
        planes = planes_of(refs, settings, with_bias=True)

        def write(at: Any) -> None:
            cotangent = refs["d_turned_q"][:, at] * settings.scale
            x = refs["q"][at, :].astype(float32).T
            d_q, of_phase = pull_back(
                x,
                refs["q_positions"][:, at],
                planes,
                _stored_turn(refs, "q", (slice(None), at)),
                cotangent,
            )
            refs["d_q"][at, :] = d_q.T.astype(refs["d_q"].dtype)
            _add_phase_gradients(refs, of_phase, with_bias=True)

        for_chunks(block_q, write)

    @pl.when((code & LAST_OF_KEY != 0) & (group_index == indices.group - 1))
    def finish_keys() -> None:
        refs["d_v"][...] = refs["d_values"][slot].astype(refs["d_v"].dtype)
        planes = planes_of(refs, settings, with_bias=False)
        # Queries carry query_scale.
        factor = settings.scale / settings.query_scale

        def write(at: Any) -> None:
            cotangent = refs["d_turned_k"][slot, at, :].T * factor
            x = refs["k"][at, :].astype(float32).T
            d_k, of_phase = pull_back(
                x,
                refs["k_positions"][:, at],
                planes,
                _stored_turn(refs, "k", (slot, slice(None), at)),
                cotangent,
            )
            refs["d_k"][at, :] = d_k.T.astype(refs["d_k"].dtype)
            _add_phase_gradients(refs, of_phase, with_bias=False)

        for_chunks(block_kv, write)


def _tile(refs: dict[str, Any], kind: Kind, settings: Settings, slot: Any) -> None:
    blocks = settings.blocks
    strips = strips_of_keys(
        kind,
        settings.visible,
        blocks.block_q_backward,
        blocks.block_kv_backward,
        blocks.sub_kv_backward,
    )

    def products(at: Rectangle) -> tuple[jax.Array, jax.Array]:
        return (
            dot(refs["turned_k"][slot, at.keys], refs["turned_q"][at.queries], (1, 1)),
            dot(refs["values"][slot, at.keys], refs["d_out"][at.queries], (1, 1)),
        )

    if not strips:
        return
    # As in the forward kernel: the next strip's first products before this strip's softmax.
    upcoming = products(strips[0])
    for index, at in enumerate(strips):
        scores, d_weights = upcoming
        if index + 1 < len(strips):
            upcoming = products(strips[index + 1])
        bent = None
        if settings.soft_cap is not None:
            bent = jnp.tanh(scores)
            scores = (settings.soft_cap * LOG2_E) * bent
        same_segment = None
        if "q_segments" in refs:
            ids = column(refs["k_segments"][:, at.keys])
            ids = jnp.tile(ids, (1, at.num_queries // LANES))
            same_segment = ids == refs["q_segments"][:, at.queries]
        scores = masked(scores, at, kind, settings.visible, 1, same_segment)
        weights = jnp.exp2(scores - refs["lse"][:, at.queries])
        d_scores = weights * (d_weights - refs["dot_out"][:, at.queries])
        if bent is not None:
            d_scores *= 1.0 - bent * bent
        d_out, q = refs["d_out"][at.queries], refs["turned_q"][at.queries]
        weights, d_scores = weights.astype(d_out.dtype), d_scores.astype(q.dtype)
        refs["d_values"][slot, at.keys] += dot(weights, d_out)
        refs["d_turned_k"][slot, at.keys] += dot(d_scores, q)
        refs["d_turned_q"][:, at.queries] += dot(
            refs["turned_k_transposed"][slot, :, at.keys], d_scores
        )
