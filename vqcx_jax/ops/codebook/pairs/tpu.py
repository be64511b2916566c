"""A Pallas kernel for TPUs: logits, cells and all gradients for a block of positions at a time.

As in `softmax.resident.tpu`, code vectors and the float32 gradient by them stay in vector memory
for the whole of a group of positions, hidden states are read once and their gradients written once.
So do the mass of the cells, B of `bilinear`, and the gradient by it. The codes of both codebooks
are put side by side there, each codebook padded to whole registers.

Where Z underflows, see `bilinear`, the kernel says so, and the batch is computed again without it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.ops import device
from vqcx_jax.ops.codebook import bilinear
from vqcx_jax.ops.codebook.multi import Form
from vqcx_jax.ops.codebook.pairs import xla
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.tpu import LANES, out_shape, up, vmem_limit
from vqcx_jax.ops.tpu_resident import TILES, Groups, Tile, columns_of, compiler_params, dot
from vqcx_jax.ops.varying import varying_like


class _Static(NamedTuple):
    form: Form
    cap: float | None
    tile: Tile
    interpret: Any


class _Inputs(NamedTuple):
    """Of `api.summed_nll`, for positions in a row."""

    h: jax.Array
    codebooks: tuple[jax.Array, jax.Array]
    log_mass: jax.Array
    codes: tuple[jax.Array, jax.Array]
    counts: jax.Array
    z_loss: jax.Array


class _Part(NamedTuple):
    """Codes, rows of the weights, that see columns of h. Additive codes are one, product two."""

    codes: slice
    columns: slice


class _Kernel(NamedTuple):
    """What a kernel is made for. num_codes: with padding. least_z: below it, Z has underflown."""

    num_codes: tuple[int, int]
    parts: tuple[_Part, ...]
    least_z: float
    cap: float | None
    tile: Tile


def summed_nll(
    h: jax.Array,
    codebooks: tuple[jax.Array, jax.Array],
    log_mass: jax.Array,
    codes: tuple[jax.Array, jax.Array],
    counts: jax.Array,
    z_loss: float | jax.Array = 0.0,
    *,
    form: Form = "additive",
    cap: float | None = None,
    tile: Tile | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.summed_nll`.

    Args:
        tile: None: the largest that fits.
        interpret: `pltpu.InterpretParams` to run on a CPU.

    Raises:
        NotSupported: codes and cells do not fit vector memory, codebooks of several widths, or a
            dtype that is neither bfloat16 nor float32.
    """
    first, second = codebooks
    if h.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotSupported(f"h: is {h.dtype}, must be bfloat16 or float32")
    if first.shape[1] != second.shape[1]:
        raise NotSupported(
            f"codebooks: have widths {first.shape[1]} and {second.shape[1]}, must have the same"
        )
    inputs = _Inputs(
        h.reshape(-1, h.shape[-1]),
        (first, second),
        log_mass,
        (codes[0].reshape(-1).astype(jnp.int32), codes[1].reshape(-1).astype(jnp.int32)),
        counts.reshape(-1),
        jnp.asarray(z_loss, jnp.float32),
    )
    tile = tile or _tile(inputs, form)
    inputs = jax.tree.map(lambda x: varying_like(x, h), inputs)
    loss, nll = _sums(_Static(form, cap, tile, interpret), inputs)
    return loss, jax.lax.stop_gradient(nll)


def _tile(inputs: _Inputs, form: Form) -> Tile:
    num_positions, itemsize = len(inputs.h), inputs.h.dtype.itemsize
    width = up(inputs.codebooks[0].shape[1], LANES)
    columns = columns_of(width)
    first, second = _padded_num_codes(inputs)
    limit = vmem_limit(device.current().kind)
    # A float32 product is one of bfloat16 parts, and those of what is resident are kept.
    of_parts = 3 * 2
    # Codes are there as they come, too.
    resident = (first + second) * width * (2 * itemsize + 4)
    resident += (first + second) * width * (of_parts if itemsize == 4 else 0)
    resident += first * second * (4 + 4 + of_parts)
    for positions, row_block in TILES:
        # h and its gradient, in two buffers each.
        moving = 2 * 2 * positions * (2 if form == "product" else 1) * width * itemsize
        held = (first + second) * (positions * itemsize + 5 * 4 * row_block)
        if moving + resident + held <= limit:
            return Tile(min(positions, up(num_positions, row_block)), row_block, columns)
    raise NotSupported(f"codebooks: {first} and {second} codes of {width} do not fit vector memory")


def _padded_num_codes(inputs: _Inputs) -> tuple[int, int]:
    first, second = inputs.codebooks
    return up(len(first), LANES), up(len(second), LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(static: _Static, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    """Without gradients; `_forward` makes them, too."""
    return xla.summed_nll(*inputs, form=static.form, cap=static.cap)


def _forward(static: _Static, inputs: _Inputs) -> tuple[tuple[jax.Array, jax.Array], _Inputs]:
    is_low, results = _by_kernel(static, inputs)
    return jax.lax.cond(is_low, lambda _: _by_xla(static, inputs), lambda results: results, results)


def _backward(
    static: _Static, gradients: _Inputs, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[_Inputs]:
    d_loss, _ = cotangents
    dtype = gradients.h.dtype
    first, second = gradients.codebooks
    return (
        gradients._replace(
            h=(d_loss * gradients.h).astype(dtype),
            codebooks=((d_loss * first).astype(dtype), (d_loss * second).astype(dtype)),
            log_mass=d_loss * gradients.log_mass,
            z_loss=d_loss * gradients.z_loss,
        ),
    )


_sums.defvjp(_forward, _backward)


def _gradients(
    h: jax.Array,
    codebooks: tuple[jax.Array, jax.Array],
    log_mass: jax.Array,
    z_loss: jax.Array,
) -> _Inputs:
    """Those by codebooks in float32, as they are sums. By integers and booleans there are none."""
    codebooks = codebooks[0].astype(jnp.float32), codebooks[1].astype(jnp.float32)
    return _Inputs(h, codebooks, log_mass, None, None, z_loss)  # type: ignore[arg-type]


def _by_xla(static: _Static, inputs: _Inputs) -> tuple[tuple[jax.Array, jax.Array], _Inputs]:
    """Loss and nll; gradients of the loss."""

    def sums(*by: Any) -> tuple[jax.Array, jax.Array]:
        h, codebooks, log_mass, z_loss = by
        replaced = inputs._replace(h=h, codebooks=codebooks, log_mass=log_mass, z_loss=z_loss)
        return xla.summed_nll(*replaced, form=static.form, cap=static.cap)

    loss, pull, nll = jax.vjp(
        sums, inputs.h, inputs.codebooks, inputs.log_mass, inputs.z_loss, has_aux=True
    )
    return (loss, nll), _gradients(*pull(jnp.ones_like(loss)))


def _by_kernel(
    static: _Static, inputs: _Inputs
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], _Inputs]]:
    """Whether Z has underflown at a position that counts; what is then wrong, as `_by_xla`."""
    tile = static.tile
    num_codes = first, second = _padded_num_codes(inputs)
    sizes = len(inputs.codebooks[0]), len(inputs.codebooks[1])
    h_NxSxW = _slices(inputs.h, static.form)
    num_slices, width = h_NxSxW.shape[1:]
    to_width = (0, -width % tile.columns)
    padded_width = width + to_width[1]
    to_positions = (0, -len(h_NxSxW) % tile.positions)
    h_NxD = jnp.pad(h_NxSxW, (to_positions, (0, 0), to_width)).reshape(
        -1, num_slices * padded_width
    )
    codebooks = tuple(jnp.pad(codes, ((0, 0), to_width)) for codes in inputs.codebooks)
    to_cells = (0, first - sizes[0]), (0, second - sizes[1])
    peak = jnp.max(inputs.log_mass)
    mass_IxJ = jnp.exp(inputs.log_mass - peak)
    rows_of_target = inputs.codes[0], first + inputs.codes[1]
    target_2xN = jnp.stack([jnp.where(inputs.counts, row, -1) for row in rows_of_target])
    # A whole register, which is transposed in the kernel: rows of two would be padded to 128 lanes.
    target_8xN = jnp.pad(target_2xN, ((0, 6), to_positions), constant_values=-1)
    kernel = _Kernel(
        num_codes,
        _parts(static.form, first, padded_width),
        # Halves of numbers, and their products, can underflow as well: see `_of_cells`.
        bilinear.least_z(3 * mass_IxJ.size),
        static.cap,
        tile,
    )
    is_code_R = [np.arange(n) < k for n, k in zip(num_codes, sizes, strict=True)]
    mask_1xR = np.where(np.concatenate(is_code_R), 0, -np.inf).astype(np.float32)[None]
    d_h_NxD, d_weights_RxW, d_mass_IxJ, sums = _call(
        kernel,
        h_NxD,
        codebooks,
        varying_like(jnp.asarray(mask_1xR), h_NxD),
        jnp.pad(mass_IxJ, to_cells),
        target_8xN,
        jnp.stack([inputs.z_loss, peak])[None],
        static.interpret,
    )
    nll, squares, num_low = sums[0], sums[1], sums[2]
    d_h_NxSxW = d_h_NxD.reshape(-1, num_slices, padded_width)[: len(h_NxSxW), :, :width]
    gradients = _gradients(
        d_h_NxSxW.reshape(inputs.h.shape),
        (
            d_weights_RxW[: sizes[0], :width],
            d_weights_RxW[first : first + sizes[1], :width],
        ),
        mass_IxJ * d_mass_IxJ[: sizes[0], : sizes[1]],
        squares,
    )
    return num_low > 0, ((nll + inputs.z_loss * squares, nll), gradients)


def _slices(h_NxD: jax.Array, form: Form) -> jax.Array:
    """What one code vector sees, (N, S, W): all of h, or each half of it."""
    num_slices = 2 if form == "product" else 1
    return h_NxD.reshape(len(h_NxD), num_slices, -1)


def _parts(form: Form, first: int, width: int) -> tuple[_Part, ...]:
    if form == "additive":
        return (_Part(slice(None), slice(None)),)
    return (
        _Part(slice(0, first), slice(0, width)),
        _Part(slice(first, None), slice(width, None)),
    )


def _call(
    kernel: _Kernel,
    h_NxD: jax.Array,
    codebooks: tuple[jax.Array, ...],
    mask_1xR: jax.Array,
    mass_IxJ: jax.Array,
    target_8xN: jax.Array,
    scalars_1x2: jax.Array,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients by h, codes and mass, and (128,): nll, log(Z)^2, and how many Z are too low.

    Args:
        codebooks: (K1, W) and (K2, W). mask_1xR: 0 for codes, -inf for padding.
        target_8xN: first and second row of the weights, -1 where none counts.
        scalars_1x2: z_loss, and the log of the mass that is 1 here.
    """
    num_positions, dim = h_NxD.shape
    num_rows, width = mask_1xR.shape[1], codebooks[0].shape[1]
    p = kernel.tile.positions
    groups = Groups.of(num_positions, p)

    def out(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return out_shape(shape, dtype, h_NxD)

    d_h_NxD, *of_groups = pl.pallas_call(
        functools.partial(_kernel, kernel),
        grid=(groups.number, groups.num_blocks),
        in_specs=[
            groups.block(dim),
            *(groups.whole(*codes.shape) for codes in codebooks),
            groups.whole(1, num_rows),
            groups.whole(*kernel.num_codes),
            groups.block_of_columns(8),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ],
        out_specs=[
            groups.block(dim),
            groups.of_group(num_rows, width),
            groups.of_group(*kernel.num_codes),
            groups.of_group(1, LANES),
        ],
        out_shape=[
            out(num_positions, dim, dtype=h_NxD.dtype),
            out(groups.number, num_rows, width),
            out(groups.number, *kernel.num_codes),
            out(groups.number, 1, LANES),
        ],
        scratch_shapes=[
            pltpu.VMEM((num_rows, p), h_NxD.dtype),
            pltpu.VMEM((num_rows, width), h_NxD.dtype),
        ],
        compiler_params=compiler_params(),
        interpret=interpret,
        name="vqcx_two_codebooks",
    )(h_NxD, *codebooks, mask_1xR, mass_IxJ, target_8xN, scalars_1x2)
    d_weights_RxW, d_mass_IxJ, sums_1xL = (sum(x[1:], start=x[0]) for x in of_groups)
    return d_h_NxD, d_weights_RxW, d_mass_IxJ, sums_1xL[0]


def _kernel(
    kernel: _Kernel,
    h_ref: Any,
    first_ref: Any,
    second_ref: Any,
    mask_ref: Any,
    mass_ref: Any,
    target_ref: Any,
    scalars_ref: Any,
    d_h_ref: Any,
    d_weights_ref: Any,
    d_mass_ref: Any,
    sums_ref: Any,
    d_z_ref: Any,
    weights_ref: Any,
) -> None:
    """See `_call`. d_z_ref: gradients by products of weights and h, (R, P). weights_ref: (R, W)."""
    positions, row_block, columns = kernel.tile
    first = kernel.num_codes[0]
    dtype, width = h_ref.dtype, weights_ref.shape[1]
    of_cells = functools.partial(_of_cells, dtype)
    z_loss, peak_mass = scalars_ref[0, 0], scalars_ref[0, 1]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for start, codes_ref in (0, first_ref), (first, second_ref):
            end = start + len(codes_ref)
            weights_ref[start:end] = codes_ref[...]
            padding = up(end, LANES) - end
            if padding:
                weights_ref[end : end + padding] = jnp.zeros((padding, width), dtype)
        d_weights_ref[...] = jnp.zeros_like(d_weights_ref)
        d_mass_ref[...] = jnp.zeros_like(d_mass_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def of_rows(index: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(index * row_block, row_block), row_block)
        products_PxR = jnp.concatenate(
            [
                dot(h_ref[rows, part.columns], weights_ref[part.codes], transposed=True)
                for part in kernel.parts
            ],
            axis=1,
        )
        l_PxR = products_PxR
        if kernel.cap is not None:
            tanh_PxR = jnp.tanh(products_PxR / kernel.cap)
            l_PxR = kernel.cap * tanh_PxR
        l_PxR = l_PxR + mask_ref[...]
        e1_PxI, peak1_Px1 = _exp_from_peak(l_PxR[:, :first])
        e2_PxJ, peak2_Px1 = _exp_from_peak(l_PxR[:, first:])
        mass_IxJ = mass_ref[...]
        sums_PxI = of_cells(e2_PxJ, mass_IxJ, transposed=True)
        sums_PxJ = of_cells(e1_PxI, mass_IxJ)
        terms_PxI = e1_PxI * sums_PxI
        z_Px1 = jnp.sum(terms_PxI, axis=1, keepdims=True)
        log_z_Px1 = jnp.log(z_Px1) + (peak1_Px1 + peak2_Px1 + peak_mass)
        targets_Px8 = target_ref[:, rows].T
        lane = jax.lax.broadcasted_iota(jnp.int32, l_PxR.shape, 1)
        is_target = (lane == targets_Px8[:, :1]) | (lane == targets_Px8[:, 1:2])
        counts_Px1 = targets_Px8[:, :1] >= 0
        is_low_Px1 = z_Px1 < kernel.least_z  # Not NaN, which stays so.
        l_target_Px1 = jnp.sum(jnp.where(is_target, l_PxR, 0.0), axis=1, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (row_block, LANES), 1)
        terms = jnp.where(lane == 0, log_z_Px1 - l_target_Px1, jnp.square(log_z_Px1))
        terms = jnp.where(lane == 2, is_low_Px1.astype(jnp.float32), terms)
        terms = jnp.where(counts_Px1 & (lane < 3), terms, 0.0)
        sums_ref[...] += jnp.sum(terms, axis=0, keepdims=True)
        # d loss / d Z, of positions that count.
        slope_Px1 = (1.0 + 2.0 * z_loss * log_z_Px1) / z_Px1
        slope_Px1 = jnp.where(counts_Px1 & ~is_low_Px1, slope_Px1, 0.0)
        scaled_PxJ = slope_Px1 * e2_PxJ
        d_mass_ref[...] += of_cells(e1_PxI.T, scaled_PxJ)
        d_l_PxR = jnp.concatenate(
            [slope_Px1 * terms_PxI, scaled_PxJ * sums_PxJ], axis=1
        ) - is_target.astype(jnp.float32)
        if kernel.cap is not None:
            d_l_PxR = d_l_PxR * (1.0 - jnp.square(tanh_PxR))
        d_z_ref[:, rows] = d_l_PxR.T.astype(dtype)
        d_l_PxR = d_l_PxR.astype(dtype)
        for part in kernel.parts:
            d_h_PxW = dot(d_l_PxR[:, part.codes], weights_ref[part.codes])
            d_h_ref[rows, part.columns] = d_h_PxW.astype(dtype)

    jax.lax.fori_loop(0, positions // row_block, of_rows, None)

    def of_columns(index: jax.Array, _: None) -> None:
        start = pl.multiple_of(index * columns, columns)
        here = pl.ds(start, columns)
        for part in kernel.parts:
            of_h = pl.ds((part.columns.start or 0) + start, columns)
            d_weights_ref[part.codes, here] += dot(d_z_ref[part.codes], h_ref[:, of_h])

    jax.lax.fori_loop(0, width // columns, of_columns, None)


def _exp_from_peak(l_PxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    peak_Px1 = jnp.max(l_PxK, axis=1, keepdims=True)
    return jnp.exp(l_PxK - peak_Px1), peak_Px1


def _of_cells(dtype: Any, x: jax.Array, y: jax.Array, transposed: bool = False) -> jax.Array:
    """A product of float32 numbers that are not negative, in a model of some dtype.

    In float32 it is right to float32's rounding. In bfloat16 the numbers go as two halves, and of
    the four products of halves all but the smallest are made, side by side: terms are right to
    2^-15 and mostly to 2^-17. What is made of them, but for the gradient by B, is rounded to 2^-9.
    """
    if dtype == jnp.float32:
        return dot(x, y, transposed)
    high, low = _halves(x)
    x = jnp.concatenate([low, high, high], axis=1)
    high, low = _halves(y)
    y = jnp.concatenate([high, low, high], axis=1 if transposed else 0)
    return dot(x, y, transposed)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
