"""Full softmax, the vocabulary in blocks: the N V logits are never held.

Forward keeps a running maximum and a running sum of exponentials. Backward computes each block's
logits again, so that a step has four products of 2 N V D operations, where `full` has three;
`summed` has three as well, where the sum of the losses is all that is asked for.

Dtypes. Products read h and weights in their own dtype and accumulate in float32; logits, softmax
and running sums are float32. Backward casts a block's d loss / d logits to the dtype of h for its
two products. d loss / d h is summed over blocks in float32 and rounded once, d loss / d weights is
whole within a block and rounded once, d loss / d bias is summed from what was not yet cast.

Rows may also lie on several devices: each streams its own, and two sums over the devices, of N
numbers each, make the loss.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops.checks import check_per_token, check_targets, check_width
from vqcx_jax.ops.labels import nan_unless_tokens
from vqcx_jax.ops.soft_cap import soft_cap
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

_Options = tuple[int, float | None]  # Rows in a block, soft-cap.
_Operands = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]
_Residuals = tuple[_Operands, Scores]


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
        UserError: vocab_block is not positive, bias is not (V,), targets are not one for each h;
            where they are known, targets out of range (under jit their nll is NaN).
    """
    if vocab_block < 1:
        raise UserError(f"vocab_block is {vocab_block}; it must be a positive integer")
    check_per_token("bias", bias, weights.shape[0])
    check_width(h, weights)
    check_targets(targets, weights.shape[0], h.shape[:-1])
    vocab_size, rows = weights.shape[0], targets  # Rows of this device.
    if vocab_axes:
        h = varying_like(h, weights)
        rows = targets - jax.lax.axis_index(vocab_axes) * vocab_size
        vocab_size *= jax.lax.axis_size(vocab_axes)
    weights_VxD = varying_like(weights, h)
    bias_V = None if bias is None else varying_like(bias, h)
    h_NxD, targets_N = h.reshape(-1, h.shape[-1]), rows.reshape(-1)
    target_logit_N, log_z_N = _scores((vocab_block, cap), h_NxD, weights_VxD, bias_V, targets_N)
    if vocab_axes:
        target_logit_N = jax.lax.psum(target_logit_N, vocab_axes)
        log_z_N = _logsumexp_over(vocab_axes, log_z_N)
    nll = (log_z_N - target_logit_N).reshape(targets.shape)
    return nan_unless_tokens(nll, targets, vocab_size), log_z_N.reshape(targets.shape)


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
    size, cap = options

    def add_block(scores: Scores, start: jax.Array, size: int) -> Scores:
        products_CxN = products(h_NxD, read(weights_VxD, start, size))
        z_CxN = with_bias(soft_cap(products_CxN, cap), bias_V, start)
        return scores.add(z_CxN, is_target(targets_N, start, size))

    scores = fold_blocks(add_block, Scores.of_nothing(h_NxD), weights_VxD.shape[0], size)
    return (scores.target, scores.log_z()), ((h_NxD, weights_VxD, bias_V, targets_N), scores)


def _backward(
    options: _Options, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    (h_NxD, weights_VxD, bias_V, targets_N), scores = residuals
    size, cap = options
    d_target_logit_N, d_log_z_N = cotangents
    # d_z = d_log_z softmax(z) + d_target_logit at the target. Where every bias is -inf, as on one
    # device of several, no row has a share in log Z and its total is 0; else it is at least 1.
    scale_N = d_log_z_N / jnp.maximum(scores.total, 1.0)

    def add_block(carry: tuple[Any, ...], start: jax.Array, size: int) -> tuple[Any, ...]:
        d_h_DxN, d_weights_VxD, d_bias_V = carry
        weights_CxD = read(weights_VxD, start, size)
        capped_CxN, to_product = jax.vjp(
            functools.partial(soft_cap, cap=cap), products(h_NxD, weights_CxD)
        )
        z_CxN = with_bias(capped_CxN, bias_V, start)
        d_z_CxN = scale_N * jnp.exp(z_CxN - scores.peak)
        d_z_CxN = d_z_CxN + jnp.where(is_target(targets_N, start, size), d_target_logit_N, 0.0)
        narrow_CxN = to_product(d_z_CxN)[0].astype(h_NxD.dtype)
        d_h_DxN = d_h_DxN + dot("cd,cn->dn", weights_CxD, narrow_CxN)
        d_weights_VxD = write(d_weights_VxD, dot("cn,nd->cd", narrow_CxN, h_NxD), start)
        if d_bias_V is not None:
            d_bias_V = write(d_bias_V, jnp.sum(d_z_CxN, axis=1), start)
        return d_h_DxN, d_weights_VxD, d_bias_V

    zeros = (
        jnp.zeros_like(h_NxD.T, jnp.float32),
        jnp.zeros_like(weights_VxD),
        None if bias_V is None else jnp.zeros_like(bias_V),
    )
    d_h_DxN, d_weights_VxD, d_bias_V = fold_blocks(add_block, zeros, weights_VxD.shape[0], size)
    return d_h_DxN.T.astype(h_NxD.dtype), d_weights_VxD, d_bias_V, None


_scores.defvjp(_forward, _backward)
