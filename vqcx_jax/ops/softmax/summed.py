"""Loss of a full softmax summed over positions: three products of 2 N V D operations, in blocks.

All that is unknown of a sum's gradients in the forward pass is one factor, the cotangent of the
sum. So the forward pass, if it is to be differentiated, goes over blocks of positions and makes of
the logits of each block both its loss and its gradients; the backward pass multiplies. `streamed`
has four products, because the cotangents of single losses are not known before.

Logits of a block of P positions are held, (V, P); on CPUs everything else is done on C of their
rows at a time (see `blocks`), so that it stays in cache. On others all rows are one block, and P is
larger: in blocks for CPUs an H100 took 20 times as long as `full` (docs/output_layer.md).

Dtypes. As in `streamed`, except that d loss / d weights is summed over blocks too: in float32, one
more array of V D where the operands are bfloat16, and rounded once.

Rows may also lie on several devices: each goes over its own, and a maximum and two sums over the
devices, of P numbers each, make the loss of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device
from vqcx_jax.ops.checks import check_per_token, check_shape, check_targets, check_width
from vqcx_jax.ops.labels import nan_if_counted
from vqcx_jax.ops.soft_cap import soft_cap
from vqcx_jax.ops.softmax import streamed
from vqcx_jax.ops.softmax.blocks import (
    VOCAB_BLOCK,
    Scores,
    dot,
    fold_blocks,
    is_target,
    products,
    read,
    with_bias,
    write,
)
from vqcx_jax.ops.varying import varying_like

# The V x D gradient is read and written once for each block, which speaks for large blocks; the
# memory, V numbers for each position, against them.
_TOKEN_BLOCK = 128
# On accelerators: so many, 512 MiB of float32, where that is more positions.
_LOGITS_OF_A_BLOCK = 2**27

_Rows = tuple[jax.Array, jax.Array | None]  # Weights and bias, or the gradients by them.
_Residuals = tuple[jax.Array, _Rows, jax.Array]


class _Options(NamedTuple):
    cap: float | None
    token_block: int
    vocab_block: int
    vocab_axes: tuple[str, ...]
    dtype: Any  # Of h.
    weights_dtype: Any


def summed_nll(
    h: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    bias: jax.Array | None = None,
    z_loss: float | jax.Array = 0.0,
    *,
    cap: float | None = None,
    token_block: int | None = None,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Sum of nll + z_loss log(Z)^2, and of nll, over the positions that count.

    nll and log Z are those of `full.nll`. With gradients it takes O(V token_block) memory beside
    them, however many positions there are; without, it is a sum over `streamed.nll`.

    Positions, and with `vocab_axes` rows, may be sharded under `shard_map`; the sums are then of
    each device's own positions. Gradients are reverse mode only.

    Args:
        h: (..., D). weights: (V, D) of the same dtype. targets: int (...), values in [0, V).
        counts: bool (...), which positions count.
        bias: float32 (V,) or None.
        z_loss: coefficient of log(Z)^2.
        cap: soft-cap of weights . h, see `ops.soft_cap`; None: as it is.
        token_block: positions whose V logits are held at a time; may exceed their number. None:
            128 on CPUs, elsewhere as many as make 512 MiB of logits, if that is more.
        vocab_axes: mesh axes over whose devices weights and bias are split, in order, by rows;
            targets count the rows of all of them. (): every device has all rows.

    Returns:
        loss, nll: float32 (). nll is there to be reported; its gradient is zero.

    Raises:
        UserError: token_block is not positive, bias is not (V,), targets or counts are not one for
            each h; where they are known, targets out of range (under jit, and if they count, sums
            are NaN).
    """
    positions, vocab_block = _block_sizes(len(weights))
    if token_block is None:
        token_block = positions
    if token_block < 1:
        raise UserError(f"token_block is {token_block}; it must be a positive integer")
    check_per_token("bias", bias, weights.shape[0])
    check_width(h, weights)
    check_targets(targets, weights.shape[0], h.shape[:-1])
    check_shape("counts", counts, targets.shape)
    vocab_size = len(weights)
    if vocab_axes:
        h = varying_like(h, weights)
        vocab_size *= jax.lax.axis_size(vocab_axes)
    loss, nll = _sums(
        _Options(cap, token_block, vocab_block, vocab_axes, h.dtype, weights.dtype),
        h.reshape(-1, h.shape[-1]),
        varying_like(weights, h),
        None if bias is None else varying_like(bias, h),
        targets.reshape(-1),
        counts.reshape(-1),
        varying_like(jnp.asarray(z_loss, jnp.float32), targets),
    )
    invalid = nan_if_counted(targets, counts, vocab_size)
    return loss + invalid, jax.lax.stop_gradient(nll) + invalid


def _block_sizes(vocab_size: int) -> tuple[int, int]:
    """Positions and rows of a block, on the device that the program is for."""
    if device.current().platform == "cpu":
        return _TOKEN_BLOCK, VOCAB_BLOCK
    positions = _LOGITS_OF_A_BLOCK // max(vocab_size, 1) // _TOKEN_BLOCK * _TOKEN_BLOCK
    return max(positions, _TOKEN_BLOCK), vocab_size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    options: _Options,
    h_NxD: jax.Array,
    weights_VxD: jax.Array,
    bias_V: jax.Array | None,
    targets_N: jax.Array,
    counts_N: jax.Array,
    z_loss: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The sums alone, for when nobody asks for gradients; `_forward` is for when somebody does."""
    nll_N, log_z_N = streamed.nll(
        h_NxD, weights_VxD, targets_N, bias_V, cap=options.cap, vocab_axes=options.vocab_axes
    )
    nll = jnp.sum(nll_N, where=counts_N)
    return nll + z_loss * jnp.sum(log_z_N**2, where=counts_N), nll


def _forward(
    options: _Options,
    h_NxD: jax.Array,
    weights_VxD: jax.Array,
    bias_V: jax.Array | None,
    targets_N: jax.Array,
    counts_N: jax.Array,
    z_loss: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    rows = weights_VxD, bias_V
    if options.vocab_axes:
        targets_N = targets_N - jax.lax.axis_index(options.vocab_axes) * len(weights_VxD)

    def add_positions(
        carry: tuple[_Rows, jax.Array], start_and_block: tuple[jax.Array, tuple[jax.Array, ...]]
    ) -> tuple[tuple[_Rows, jax.Array], tuple[jax.Array, jax.Array]]:
        d_rows, d_h_NxD = carry
        start, block = start_and_block
        h_PxD, targets_P, counts_P = block
        scores, products_VxP = _scores_and_products(options, rows, h_PxD, targets_P)
        scores = scores.over(options.vocab_axes)
        log_z_P = scores.log_z()
        slope_P = jnp.where(counts_P, 1.0 + 2.0 * z_loss * log_z_P, 0.0)  # d loss / d log Z.
        d_h_PxD, d_rows = _add_gradients(
            options, rows, block, scores, products_VxP, slope_P, d_rows
        )
        return (d_rows, write(d_h_NxD, d_h_PxD, start)), (log_z_P - scores.target, log_z_P)

    d_rows = (
        jnp.zeros_like(weights_VxD, jnp.float32),
        None if bias_V is None else jnp.zeros_like(bias_V),
    )
    num_blocks = -(-len(h_NxD) // options.token_block)
    blocks = tuple(_in_blocks(x, num_blocks) for x in (h_NxD, targets_N, counts_N))
    size = blocks[0].shape[1]
    # Written where it lies: what a scan stacks would be copied once more.
    d_h_NxD = jnp.zeros_like(h_NxD, jnp.float32, shape=(num_blocks * size, h_NxD.shape[1]))
    (d_rows, d_h_NxD), (nll_N, log_z_N) = jax.lax.scan(
        add_positions, (d_rows, d_h_NxD), (size * jnp.arange(num_blocks), blocks)
    )
    nll_N, log_z_N = (x.reshape(-1)[: len(h_NxD)] for x in (nll_N, log_z_N))
    d_h_NxD = d_h_NxD[: len(h_NxD)]
    nll = jnp.sum(nll_N, where=counts_N)
    squares = jnp.sum(log_z_N**2, where=counts_N)
    return (nll + z_loss * squares, nll), (d_h_NxD, d_rows, squares)


def _scores_and_products(
    options: _Options, rows: _Rows, h_PxD: jax.Array, targets_P: jax.Array
) -> tuple[Scores, jax.Array]:
    """Scores of P positions, and the products that they are made of, float32 (V, P)."""
    weights_VxD, bias_V = rows

    def add_block(
        carry: tuple[Scores, jax.Array], start: jax.Array, size: int
    ) -> tuple[Scores, jax.Array]:
        scores, products_VxP = carry
        products_CxP = products(h_PxD, read(weights_VxD, start, size))
        z_CxP = with_bias(soft_cap(products_CxP, options.cap), bias_V, start)
        scores = scores.add(z_CxP, is_target(targets_P, start, size))
        return scores, write(products_VxP, products_CxP, start)

    shape = (len(weights_VxD), len(h_PxD))
    zeros_VxP = jnp.zeros_like(weights_VxD, jnp.float32, shape=shape)
    nothing = Scores.of_nothing(h_PxD), zeros_VxP
    return fold_blocks(add_block, nothing, len(weights_VxD), options.vocab_block)


def _add_gradients(
    options: _Options,
    rows: _Rows,
    block: tuple[jax.Array, ...],
    scores: Scores,
    products_VxP: jax.Array,
    slope_P: jax.Array,
    d_rows: _Rows,
) -> tuple[jax.Array, _Rows]:
    """Gradient by h of P positions, float32 (P, D), and d_rows with their share added."""
    weights_VxD, bias_V = rows
    h_PxD, targets_P, counts_P = block
    # d_z = slope softmax(z) - 1 at the target, of positions that count.
    scale_P = slope_P / scores.total
    ones_P = counts_P.astype(jnp.float32)

    def add_block(carry: tuple[Any, ...], start: jax.Array, size: int) -> tuple[Any, ...]:
        d_h_PxD, (d_weights_VxD, d_bias_V) = carry
        capped_CxP, to_product = jax.vjp(
            functools.partial(soft_cap, cap=options.cap), read(products_VxP, start, size)
        )
        z_CxP = with_bias(capped_CxP, bias_V, start)
        d_z_CxP = scale_P * jnp.exp(z_CxP - scores.peak)
        d_z_CxP = d_z_CxP - jnp.where(is_target(targets_P, start, size), ones_P, 0.0)
        narrow_CxP = to_product(d_z_CxP)[0].astype(options.dtype)
        d_h_PxD = d_h_PxD + dot("cd,cp->pd", read(weights_VxD, start, size), narrow_CxP)
        d_weights_VxD = _add(d_weights_VxD, dot("cp,pd->cd", narrow_CxP, h_PxD), start)
        if d_bias_V is not None:
            d_bias_V = _add(d_bias_V, jnp.sum(d_z_CxP, axis=1), start)
        return d_h_PxD, (d_weights_VxD, d_bias_V)

    carry = jnp.zeros_like(h_PxD, jnp.float32), d_rows
    return fold_blocks(add_block, carry, len(weights_VxD), options.vocab_block)


def _backward(
    options: _Options, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    d_h_NxD, (d_weights_VxD, d_bias_V), squares = residuals
    d_loss, _ = cotangents
    return (
        (d_loss * d_h_NxD).astype(options.dtype),
        (d_loss * d_weights_VxD).astype(options.weights_dtype),
        None if d_bias_V is None else d_loss * d_bias_V,
        None,
        None,
        d_loss * squares,
    )


_sums.defvjp(_forward, _backward)


def _in_blocks(x: jax.Array, num_blocks: int) -> jax.Array:
    """(N, ...) as (num_blocks, P, ...), the last padded with zeros."""
    padding = -len(x) % num_blocks
    x = jnp.pad(x, [(0, padding), *[(0, 0)] * (x.ndim - 1)])
    return x.reshape(num_blocks, -1, *x.shape[1:])


def _add(rows: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return write(rows, read(rows, start, len(block)) + block, start)
