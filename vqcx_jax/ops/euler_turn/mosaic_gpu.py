"""The turn as a Hopper kernel: queries or keys are read once and written once, in both passes.

XLA writes radii, phases and their sines to memory, in float32, on the way. Here a block of threads
takes one head of so many positions, tile by tile. Nothing in a tile depends on its neighbours, so
that arrays need no layout but the one in which they lie in memory; gradients by the parameters of a
plane are summed over a block's tiles in registers, and over rows and blocks by XLA.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from vqcx_jax.ops import attention, device, dispatch, gpu
from vqcx_jax.ops.attention.planes import per_query_head
from vqcx_jax.ops.attention.polar import Turn, polar, pull_back_pair
from vqcx_jax.ops.attention.trig import arctan2, cos_sin
from vqcx_jax.ops.euler_turn.block_sizes import BlockSizes, Tile, block_sizes, check
from vqcx_jax.ops.varying import varying_like


def queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
    *,
    blocks: BlockSizes | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.queries_and_keys`.

    Args:
        blocks: None: those of the table for this device.

    Raises:
        UserError: blocks that no kernel can be made of.
        NotSupported: another width or dtype, or no Hopper GPU.
    """
    gpu.require_hopper()
    if blocks is None:
        blocks = block_sizes(device.current().kind)
    check(blocks)
    num_planes = q.shape[-1] // 2
    if q.shape[-1] % 2 or num_planes not in (16, 32, 64, 128):
        raise dispatch.NotSupported(f"head_dim={q.shape[-1]}: must be 32, 64, 128 or 256")
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise dispatch.NotSupported(f"dtype={q.dtype}: must be bfloat16, float16 or float32")
    q_delta = per_query_head(delta, q.shape[2])
    return (
        _turned(blocks, q, cos, sin, q_delta, bias),
        _turned(blocks, k, cos, sin, delta, jnp.zeros_like(delta)),
    )


def _turned(
    blocks: BlockSizes,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """Mu exp(i (delta theta + bias)) times cos + i sin; delta and bias as in `euler_adapt`."""
    num_batch, num_rows, num_heads, head_dim = x.shape
    planes = (num_heads, head_dim // 2)
    delta, bias = (jnp.broadcast_to(y.astype(jnp.float32), planes) for y in (delta, bias))
    cos, sin, delta, bias = (varying_like(y, x) for y in (cos, sin, delta, bias))
    # A table for all heads, or one for each group of heads.
    cos, sin = (y if y.ndim == 4 else y[:, :, None] for y in (cos, sin))
    halves = x.reshape(num_batch, num_rows, num_heads, 2, head_dim // 2)
    return _turned_halves(blocks, halves, cos, sin, delta, bias).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _turned_halves(
    blocks: BlockSizes,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    """Of (B, T, H, 2, P), with tables (B, T, K, P), and (H, P)."""
    return _forward(blocks, x, cos, sin, delta, bias)


def _turned_fwd(blocks: BlockSizes, *args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _forward(blocks, *args), args


def _turned_bwd(
    blocks: BlockSizes, args: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    x, cos, sin, delta, bias = args
    dx, d_delta, d_bias = _backward(blocks, x, cos, sin, delta, bias, cotangent)
    # By the tables only where frequencies are trained; else nobody asks, and XLA drops it.
    wide = x.astype(jnp.float32).reshape(*x.shape[:3], -1)
    real, imag = jnp.split(attention.euler_adapt(wide, delta, bias), 2, axis=-1)
    d_real, d_imag = cotangent[..., 0, :], cotangent[..., 1, :]
    groups = (*cos.shape[:3], -1, cos.shape[-1])
    d_cos = jnp.sum((real * d_real + imag * d_imag).reshape(groups), axis=3)
    d_sin = jnp.sum((real * d_imag - imag * d_real).reshape(groups), axis=3)
    return dx, d_cos, d_sin, d_delta, d_bias


_turned_halves.defvjp(_turned_fwd, _turned_bwd)


class _Plan(NamedTuple):
    """A block of threads has one head, and `steps` tiles of `rows` positions."""

    rows: int
    steps: int
    grid: tuple[int, int, int]


def _plan(x: jax.Array, tile: Tile) -> _Plan:
    num_batch, num_rows, num_heads, _, num_planes = x.shape
    rows = tile.size // num_planes
    steps = min(tile.steps, pl.cdiv(num_rows, rows))
    return _Plan(rows, steps, (num_batch, pl.cdiv(num_rows, rows * steps), num_heads))


def _forward(
    blocks: BlockSizes,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
) -> jax.Array:
    plan = _plan(x, blocks.forward)
    tile = (plan.rows, x.shape[-1])
    plgpu = gpu.pallas()

    def body(
        x_ref: Any, cos_ref: Any, sin_ref: Any, delta_ref: Any, bias_ref: Any, y_ref: Any,
        real_out: Any, imag_out: Any, *planes: Any,
    ) -> None:  # fmt: skip
        batch, block, head = (lax.axis_index(name) for name in _GRID)
        delta, bias = _load_planes(plgpu, (delta_ref, bias_ref), head, planes)

        def turn(index: Any, real_ref: Any, imag_ref: Any, cos_ref: Any, sin_ref: Any) -> None:
            real, imag = (ref[...].astype(jnp.float32) for ref in (real_ref, imag_ref))
            radius, theta = polar(real, imag)
            phase = _phase(delta * theta + bias, cos_ref[...], sin_ref[...])
            result = (radius * phase[0], radius * phase[1])
            step = block * plan.steps + index[0]
            _write(plgpu, result, (real_out, imag_out), y_ref, (batch, step, head), index[0])

        halves, table = _specs(plgpu, x, cos, plan, (batch, block, head))
        plgpu.emit_pipeline(
            turn, grid=(plan.steps,), in_specs=[*halves, table, table], max_concurrent_steps=2
        )(x_ref, x_ref, cos_ref, sin_ref)
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=plan.grid,
        grid_names=_GRID,
        scratch_types=[
            *_staging(plgpu, x, plan),
            *(plgpu.SMEM(tile, jnp.float32) for _ in range(2)),
            plgpu.Barrier(num_barriers=2),
        ],
    )
    y = kernel(x, cos, sin, *(_for_rows(y, plan) for y in (delta, bias)))
    return varying_like(y, x)


def _backward(
    blocks: BlockSizes,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by x, (H, P) by delta and by bias."""
    plan = _plan(x, blocks.backward)
    num_planes = x.shape[-1]
    tile = (plan.rows, num_planes)
    plgpu = gpu.pallas()

    def body(
        x_ref: Any, cos_ref: Any, sin_ref: Any, delta_ref: Any, bias_ref: Any, g_ref: Any,
        dx_ref: Any, sums_ref: Any, real_out: Any, imag_out: Any, *scratch: Any,
    ) -> None:  # fmt: skip
        *planes, delta_out, bias_out, barrier = scratch
        batch, block, head = (lax.axis_index(name) for name in _GRID)
        delta, bias = _load_planes(plgpu, (delta_ref, bias_ref), head, (*planes, barrier))

        def pull_back(index: Any, *refs_and_sums: Any) -> tuple[jax.Array, jax.Array]:
            *refs, (delta_sum, bias_sum) = refs_and_sums
            real, imag, d_real, d_imag, cos, sin = (ref[...].astype(jnp.float32) for ref in refs)
            theta = arctan2(imag, real)
            turn = Turn(*_phase(delta * theta + bias, cos, sin), theta)
            result, d_phase = pull_back_pair((real, imag), delta, turn, (d_real, d_imag))
            step = block * plan.steps + index[0]
            _write(plgpu, result, (real_out, imag_out), dx_ref, (batch, step, head), index[0])
            return delta_sum + theta * d_phase, bias_sum + d_phase

        halves, table = _specs(plgpu, x, cos, plan, (batch, block, head))
        sums = plgpu.emit_pipeline(
            pull_back,
            grid=(plan.steps,),
            in_specs=[*halves, *halves, table, table],
            max_concurrent_steps=2,
            init_carry=(jnp.zeros_like(delta), jnp.zeros_like(bias)),
        )(x_ref, x_ref, g_ref, g_ref, cos_ref, sin_ref)
        for index, (total, out) in enumerate(zip(sums, (delta_out, bias_out), strict=True)):
            out[...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, sums_ref.at[batch, block, head, index])
        plgpu.wait_smem_to_gmem(0)

    num_batch, num_blocks, num_heads = plan.grid
    sums_shape = (num_batch, num_blocks, num_heads, 2, *tile)
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(sums_shape, jnp.float32),
        ],
        grid=plan.grid,
        grid_names=_GRID,
        scratch_types=[
            *_staging(plgpu, x, plan),
            *(plgpu.SMEM(tile, jnp.float32) for _ in range(4)),
            plgpu.Barrier(num_barriers=2),
        ],
    )
    planes = (_for_rows(y, plan) for y in (delta, bias))
    results = kernel(x, cos, sin, *planes, cotangent.astype(x.dtype))
    dx, sums = (varying_like(y, x) for y in results)
    d_delta, d_bias = jnp.moveaxis(jnp.sum(sums, axis=(0, 1, 4)), 1, 0)
    return dx, d_delta, d_bias


# ---------------------------------------------------------------- within the kernels

_GRID = ("batch", "block", "head")


def _for_rows(per_plane: jax.Array, plan: _Plan) -> jax.Array:
    """(H, P) for every row of a tile: (H, rows, P)."""
    return jnp.repeat(per_plane[:, None], plan.rows, axis=1)


def _staging(plgpu: Any, x: jax.Array, plan: _Plan) -> list[Any]:
    """Two tiles of real and of imaginary parts: one is written while the other is sent."""
    tiles = (2, plan.rows, x.shape[-1])
    return [plgpu.SMEM(tiles, x.dtype), plgpu.SMEM(tiles, x.dtype)]


def _load_planes(plgpu: Any, refs: Any, head: jax.Array, scratch: Any) -> list[jax.Array]:
    *planes, barrier = scratch
    for index, (ref, plane) in enumerate(zip(refs, planes, strict=True)):
        plgpu.copy_gmem_to_smem(ref.at[head], plane, barrier.at[index])
    for index in range(len(planes)):
        plgpu.barrier_wait(barrier.at[index])
    return [plane[...] for plane in planes]


def _specs(
    plgpu: Any, x: jax.Array, table: jax.Array, plan: _Plan, where: Any
) -> tuple[list[Any], Any]:
    """Of real and imaginary parts, and of tables."""
    batch, block, head = where
    num_planes = x.shape[-1]
    table_head = lax.div(head, x.shape[2] // table.shape[2])

    def half(part: int) -> Any:
        return plgpu.BlockSpec(
            (None, plan.rows, None, None, num_planes),
            lambda step: (batch, block * plan.steps + step, head, part, 0),
        )

    of_table = plgpu.BlockSpec(
        (None, plan.rows, None, num_planes),
        lambda step: (batch, block * plan.steps + step, table_head, 0),
    )
    return [half(0), half(1)], of_table


def _phase(adapted: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of an adapted phase, turned by the table's."""
    cos_phi, sin_phi = cos_sin(adapted)
    return cos_phi * cos - sin_phi * sin, sin_phi * cos + cos_phi * sin


def _write(
    plgpu: Any, halves: Any, staging: Any, out_ref: Any, where: Any, index: jax.Array
) -> None:
    """Sends a tile on its way to memory, which goes on while the next one is computed."""
    batch, step, head = where
    rows = staging[0].shape[1]
    slot = lax.rem(index, 2)
    plgpu.wait_smem_to_gmem(2, wait_read_only=True)
    for half, tile in zip(halves, staging, strict=True):
        tile.at[slot][...] = half.astype(tile.dtype)
    plgpu.commit_smem()
    for part, tile in enumerate(staging):
        out = out_ref.at[batch, pl.ds(step * rows, rows), head, part]
        plgpu.copy_smem_to_gmem(tile.at[slot], out)
