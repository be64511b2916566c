"""A Pallas kernel for TPUs: all of a step's three products for a block of positions at a time.

Weights, and the gradient by them in float32, stay in vector memory for the whole of a group of
positions; a chip with two cores gives each of them a group. Logits of a few positions live there
too, and are never written. Hidden states are read once and their gradients written once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops import device
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.softmax.resident import xla
from vqcx_jax.ops.tpu import LANES, out_shape, up, vmem_limit
from vqcx_jax.ops.tpu_resident import TILES, Groups, Tile, columns_of, compiler_params, dot
from vqcx_jax.ops.varying import varying_like

_ROWS = 16  # A register of bfloat16 has so many.


class _Static(NamedTuple):
    cap: float | None
    tile: Tile
    interpret: Any


class _Inputs(NamedTuple):
    """Padded: h (N, D), weights (R, D), bias (1, R), target (N, 1), -1: none, z_loss (1, 1)."""

    h: jax.Array
    weights: jax.Array
    bias: jax.Array
    target: jax.Array
    z_loss: jax.Array


def summed_nll(
    h: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    bias: jax.Array | None = None,
    z_loss: float | jax.Array = 0.0,
    *,
    cap: float | None = None,
    tile: Tile | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.summed_nll`.

    Args:
        tile: None: the largest that fits.
        interpret: `pltpu.InterpretParams` to run on a CPU.

    Raises:
        NotSupported: weights and their gradient do not fit vector memory, or a dtype that is
            neither bfloat16 nor float32.
    """
    num_rows, dim = weights.shape
    if h.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotSupported(f"h: is {h.dtype}, must be bfloat16 or float32")
    h_NxD = h.reshape(-1, dim)
    padded_rows = up(num_rows, _ROWS)
    tile = tile or _tile(len(h_NxD), padded_rows, dim, h.dtype.itemsize)
    padded_dim = up(dim, tile.columns)
    to_rows = (0, padded_rows - num_rows)
    to_positions = (0, -len(h_NxD) % tile.positions)
    to_dim = (0, padded_dim - dim)
    if bias is None:
        bias = jnp.zeros(num_rows, jnp.float32)
    target_N = jnp.where(counts, targets, -1).reshape(-1).astype(jnp.int32)
    inputs = _Inputs(
        jnp.pad(h_NxD, (to_positions, to_dim)),
        jnp.pad(weights, (to_rows, to_dim)),
        jnp.pad(bias.astype(jnp.float32), to_rows, constant_values=-jnp.inf)[None],
        jnp.pad(target_N, to_positions, constant_values=-1)[:, None],
        jnp.asarray(z_loss, jnp.float32).reshape(1, 1),
    )
    inputs = _Inputs(*(varying_like(x, h) for x in inputs))
    loss, nll = _sums(_Static(cap, tile, interpret), inputs)
    return loss, jax.lax.stop_gradient(nll)


def _tile(num_positions: int, num_rows: int, dim: int, itemsize: int) -> Tile:
    dim = up(dim, LANES)
    columns = columns_of(dim)
    limit = vmem_limit(device.current().kind)
    for positions, row_block in TILES:
        moving = 2 * 2 * positions * dim * itemsize  # h and its gradient, in two buffers each.
        # A float32 product is one of bfloat16 parts, and those of the weights are kept.
        parts = 3 * 2 if itemsize == 4 else 0
        resident = num_rows * dim * (itemsize + 4 + parts)
        held = num_rows * (positions * itemsize + 3 * 4 * row_block)
        if moving + resident + held <= limit:
            return Tile(min(positions, up(num_positions, row_block)), row_block, columns)
    raise NotSupported(f"weights: {num_rows} rows of {dim} do not fit vector memory")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: _Static, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    """Without gradients; `_forward` makes them, too."""
    target_N = inputs.target[:, 0]
    return xla.summed_nll(
        inputs.h,
        inputs.weights,
        jnp.maximum(target_N, 0),
        target_N >= 0,
        inputs.bias[0],
        inputs.z_loss[0, 0],
        cap=static.cap,
    )


def _forward(static: _Static, inputs: _Inputs) -> tuple[tuple[jax.Array, jax.Array], _Inputs]:
    num_positions, dim = inputs.h.shape
    num_rows, p = len(inputs.weights), static.tile.positions
    groups = Groups.of(num_positions, p)

    def out(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return out_shape(shape, dtype, inputs.h)

    d_h_NxD, d_weights, d_bias, sums = pl.pallas_call(
        functools.partial(_kernel, static),
        grid=(groups.number, groups.num_blocks),
        in_specs=[
            groups.block(dim),
            groups.whole(num_rows, dim),
            groups.whole(1, num_rows),
            groups.block(1),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ],
        out_specs=[
            groups.block(dim),
            groups.of_group(num_rows, dim),
            groups.of_group(1, num_rows),
            groups.of_group(1, LANES),
        ],
        out_shape=[
            out(num_positions, dim, dtype=inputs.h.dtype),
            out(groups.number, num_rows, dim),
            out(groups.number, 1, num_rows),
            out(groups.number, 1, LANES),
        ],
        scratch_shapes=[pltpu.VMEM((num_rows, p), inputs.h.dtype)],
        compiler_params=compiler_params(),
        interpret=static.interpret,
        name="vqcx_resident_softmax",
    )(*inputs)
    nll, squares = jnp.sum(sums, axis=(0, 1))[:2]
    gradients = _Inputs(
        d_h_NxD,
        sum(d_weights[1:], start=d_weights[0]),
        sum(d_bias[1:], start=d_bias[0]),
        None,  # type: ignore[arg-type]
        squares.reshape(1, 1),
    )
    return (nll + inputs.z_loss[0, 0] * squares, nll), gradients


def _kernel(
    static: _Static,
    h_ref: Any,
    weights_ref: Any,
    bias_ref: Any,
    target_ref: Any,
    z_loss_ref: Any,
    d_h_ref: Any,
    d_weights_ref: Any,
    d_bias_ref: Any,
    sums_ref: Any,
    d_z_ref: Any,
) -> None:
    """sums_ref: nll and log(Z)^2 in the first two lanes. d_z_ref: gradients by logits, (R, P)."""
    positions, row_block, columns = static.tile
    dim = weights_ref.shape[1]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        d_weights_ref[...] = jnp.zeros_like(d_weights_ref)
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def of_rows(index: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(index * row_block, row_block), row_block)
        products_PxR = dot(h_ref[rows], weights_ref[...], transposed=True)
        if static.cap is None:
            z_PxR = products_PxR + bias_ref[...]
        else:
            tanh_PxR = jnp.tanh(products_PxR / static.cap)
            z_PxR = static.cap * tanh_PxR + bias_ref[...]
        peak_Px1 = jnp.max(z_PxR, axis=1, keepdims=True)
        e_PxR = jnp.exp(z_PxR - peak_Px1)
        total_Px1 = jnp.sum(e_PxR, axis=1, keepdims=True)
        log_z_Px1 = peak_Px1 + jnp.log(total_Px1)
        target_Px1 = target_ref[rows]
        is_target = jax.lax.broadcasted_iota(jnp.int32, z_PxR.shape, 1) == target_Px1
        counts_Px1 = target_Px1 >= 0
        z_target_Px1 = jnp.sum(jnp.where(is_target, z_PxR, 0.0), axis=1, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (row_block, LANES), 1)
        terms = jnp.where(lane == 0, log_z_Px1 - z_target_Px1, jnp.square(log_z_Px1))
        terms = jnp.where(counts_Px1 & (lane < 2), terms, 0.0)
        sums_ref[...] += jnp.sum(terms, axis=0, keepdims=True)
        # d loss / d log Z, of positions that count.
        slope_Px1 = jnp.where(counts_Px1, 1.0 + 2.0 * z_loss_ref[0, 0] * log_z_Px1, 0.0)
        d_z_PxR = e_PxR * (slope_Px1 / total_Px1) - is_target.astype(jnp.float32)
        d_bias_ref[...] += jnp.sum(d_z_PxR, axis=0, keepdims=True)
        if static.cap is not None:
            d_z_PxR = d_z_PxR * (1.0 - jnp.square(tanh_PxR))
        d_z_ref[:, rows] = d_z_PxR.T.astype(d_z_ref.dtype)
        d_h_ref[rows] = dot(d_z_PxR.astype(d_h_ref.dtype), weights_ref[...]).astype(d_h_ref.dtype)

    jax.lax.fori_loop(0, positions // row_block, of_rows, None)

    def of_columns(index: jax.Array, _: None) -> None:
        here = pl.ds(pl.multiple_of(index * columns, columns), columns)
        d_weights_ref[:, here] += dot(d_z_ref[...], h_ref[:, here])

    jax.lax.fori_loop(0, dim // columns, of_columns, None)


def _backward(
    static: _Static, gradients: _Inputs, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[_Inputs]:
    d_loss, _ = cotangents
    dtype = gradients.h.dtype
    return (
        _Inputs(
            (d_loss * gradients.h).astype(dtype),
            (d_loss * gradients.weights).astype(dtype),
            d_loss * gradients.bias,
            None,  # type: ignore[arg-type]
            d_loss * gradients.z_loss,
        ),
    )


_sums.defvjp(_forward, _backward)
