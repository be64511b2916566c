"""Full softmax, the vocabulary in blocks: the N V logits are never held.

Forward keeps a running maximum and a running sum of exponentials. Backward computes each block's
logits again, so that a step has four products of 2 N V D operations, where `full` has three.

Blocks are (C, N), the positions of a token side by side: sums and maxima over tokens then add
whole rows. What V leaves over of the blocks is a smaller block, so that nothing is padded.

Dtypes. Products read h and weights in their own dtype and accumulate in float32; logits, softmax
and running sums are float32. Backward casts a block's d loss / d logits to the dtype of h for its
two products. d loss / d h is summed over blocks in float32 and rounded once, d loss / d weights is
whole within a block and rounded once, d loss / d bias is summed from what was not yet cast.

Rows may also lie on several devices: each streams its own, and two sums over the devices, of N
numbers each, make the loss.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops.soft_cap import soft_cap
from vqcx_jax.ops.varying import varying_like

# On CPU within 8% of the fastest block at every shape tried (N 128 to 4096), with about half the
# memory of the next larger one. See benchmarks/output_layer.py.
VOCAB_BLOCK = 1024

_Carry = TypeVar("_Carry")
_Options = tuple[int, float | None]  # Rows in a block, soft-cap.
_Operands = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]
_Residuals = tuple[_Operands, jax.Array, jax.Array]


def nll(
    h: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    cap: float | None = None,
    vocab_block: int = VOCAB_BLOCK,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z)[target] and log Z, equal to `full.nll`, in O(N vocab_block) memory.

    Positions, and with `vocab_axes` rows, may be sharded under `shard_map`. Gradients are reverse
    mode only.

    Args:
        h: (..., D). weights: (V, D) of the same dtype. targets: int (...), values in [0, V).
        bias: (V,) or None.
        cap: soft-cap of weights . h, see `ops.soft_cap`; None: as it is.
        vocab_block: rows of weights whose logits are held at a time; may exceed V.
        vocab_axes: mesh axes over whose devices weights and bias are split, in order, by rows;
            targets count the rows of all of them. (): every device has all rows.

    Returns:
        nll, log_z: float32 (...).

    Raises:
        UserError: vocab_block is not positive.
    """
    if vocab_block < 1:
        raise UserError(f"vocab_block is {vocab_block}; it must be a positive integer")
    shape = targets.shape
    if vocab_axes:
        h = varying_like(h, weights)
        targets = targets - jax.lax.axis_index(vocab_axes) * weights.shape[0]
    weights_VxD = varying_like(weights, h)
    bias_V = None if bias is None else varying_like(bias, h)
    h_NxD, targets_N = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
    size = min(vocab_block, weights.shape[0])
    target_logit_N, log_z_N = _scores((size, cap), h_NxD, weights_VxD, bias_V, targets_N)
    if vocab_axes:
        target_logit_N = jax.lax.psum(target_logit_N, vocab_axes)
        log_z_N = _logsumexp_over(vocab_axes, log_z_N)
    return (log_z_N - target_logit_N).reshape(shape), log_z_N.reshape(shape)


def _logsumexp_over(mesh_axes: tuple[str, ...], x: jax.Array) -> jax.Array:
    peak = jax.lax.pmax(jax.lax.stop_gradient(x), mesh_axes)
    return peak + jnp.log(jax.lax.psum(jnp.exp(x - peak), mesh_axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(
    options: _Options,
    h_NxD: jax.Array,
    weights_VxD: jax.Array,
    bias_V: jax.Array | None,
    targets_N: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logit of the target (0 if it is in no row) and log Z, float32 (N,)."""
    return _forward(options, h_NxD, weights_VxD, bias_V, targets_N)[0]


def _forward(
    options: _Options,
    h_NxD: jax.Array,
    weights_VxD: jax.Array,
    bias_V: jax.Array | None,
    targets_N: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    operands = (h_NxD, weights_VxD, bias_V, targets_N)
    size, cap = options

    def add_block(carry: tuple[Any, ...], start: jax.Array, size: int) -> tuple[Any, ...]:
        peak_N, sum_N, target_logit_N = carry
        z_CxN = _with_bias(soft_cap(_products(operands, start, size), cap), bias_V, start)
        is_target_CxN = _is_target(targets_N, start, size)
        new_peak_N = jnp.maximum(peak_N, jnp.max(z_CxN, axis=0))
        sum_N = sum_N * jnp.exp(peak_N - new_peak_N)
        sum_N = sum_N + jnp.sum(jnp.exp(z_CxN - new_peak_N), axis=0)
        target_logit_N = target_logit_N + jnp.sum(jnp.where(is_target_CxN, z_CxN, 0.0), axis=0)
        return new_peak_N, sum_N, target_logit_N

    zeros_N = jnp.zeros_like(h_NxD[:, 0], jnp.float32)
    # A finite start: where every bias so far is -inf, there is no -inf - -inf.
    lowest_N = zeros_N + jnp.finfo(jnp.float32).min
    peak_N, sum_N, target_logit_N = _fold_blocks(
        add_block, (lowest_N, zeros_N, zeros_N), weights_VxD.shape[0], size
    )
    log_z_N = peak_N + jnp.log(sum_N)
    # The two parts of log Z, because exp(z - log Z) would lose the digits of a large log Z.
    return (target_logit_N, log_z_N), (operands, peak_N, sum_N)


def _backward(
    options: _Options, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    operands, peak_N, sum_N = residuals
    h_NxD, weights_VxD, bias_V, targets_N = operands
    size, cap = options
    d_target_logit_N, d_log_z_N = cotangents
    # d_z = d_log_z softmax(z) + d_target_logit at the target.
    scale_N = d_log_z_N / sum_N

    def add_block(carry: tuple[Any, ...], start: jax.Array, size: int) -> tuple[Any, ...]:
        d_h_DxN, d_weights_VxD, d_bias_V = carry
        capped_CxN, to_product = jax.vjp(
            functools.partial(soft_cap, cap=cap), _products(operands, start, size)
        )
        z_CxN = _with_bias(capped_CxN, bias_V, start)
        is_target_CxN = _is_target(targets_N, start, size)
        d_z_CxN = scale_N * jnp.exp(z_CxN - peak_N)
        d_z_CxN = d_z_CxN + jnp.where(is_target_CxN, d_target_logit_N, 0.0)
        narrow_CxN = to_product(d_z_CxN)[0].astype(h_NxD.dtype)
        weights_CxD = jax.lax.dynamic_slice_in_dim(weights_VxD, start, size)
        d_h_DxN = d_h_DxN + _dot("cd,cn->dn", weights_CxD, narrow_CxN)
        d_weights_VxD = _write(d_weights_VxD, _dot("cn,nd->cd", narrow_CxN, h_NxD), start)
        if d_bias_V is not None:
            d_bias_V = _write(d_bias_V, jnp.sum(d_z_CxN, axis=1), start)
        return d_h_DxN, d_weights_VxD, d_bias_V

    zeros = (
        jnp.zeros_like(h_NxD.T, jnp.float32),
        jnp.zeros_like(weights_VxD),
        None if bias_V is None else jnp.zeros_like(bias_V),
    )
    d_h_DxN, d_weights_VxD, d_bias_V = _fold_blocks(add_block, zeros, weights_VxD.shape[0], size)
    return d_h_DxN.T.astype(h_NxD.dtype), d_weights_VxD, d_bias_V, None


_scores.defvjp(_forward, _backward)


def _fold_blocks(
    step: Callable[[_Carry, jax.Array, int], _Carry], carry: _Carry, vocab_size: int, size: int
) -> _Carry:
    """Carry = step(carry, start, size) over whole blocks, then over what they leave."""
    num_blocks, rest = divmod(vocab_size, size)
    carry = jax.lax.fori_loop(0, num_blocks, lambda b, c: step(c, b * size, size), carry)
    return step(carry, jnp.asarray(vocab_size - rest), rest) if rest else carry


def _products(operands: _Operands, start: jax.Array, size: int) -> jax.Array:
    """Weights . h, float32 (C, N), of the rows from start on."""
    h_NxD, weights_VxD, _, _ = operands
    weights_CxD = jax.lax.dynamic_slice_in_dim(weights_VxD, start, size)
    return _dot("cd,nd->cn", weights_CxD, h_NxD)


def _with_bias(z_CxN: jax.Array, bias_V: jax.Array | None, start: jax.Array) -> jax.Array:
    if bias_V is None:
        return z_CxN
    bias_C = jax.lax.dynamic_slice_in_dim(bias_V, start, z_CxN.shape[0])
    return z_CxN + bias_C.astype(jnp.float32)[:, None]


def _is_target(targets_N: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return (start + jnp.arange(size))[:, None] == targets_N


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _write(rows: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(rows, block.astype(rows.dtype), start, axis=0)
