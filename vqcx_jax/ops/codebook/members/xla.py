"""Logits within classes in plain JAX: gathers of code logits."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights
from vqcx_jax.ops.product import product


def nll(
    h: jax.Array, weights: Weights, classes: Classes, class_: jax.Array, rank: jax.Array
) -> jax.Array:
    """See `api.nll`."""
    z_xR = logits(h, weights, classes, jnp.maximum(class_, 0))
    of_member = jax.nn.logsumexp(z_xR, axis=-1) - multi.pick(z_xR, rank)
    return jnp.where(class_ < 0, 0.0, of_member)


def logits(h: jax.Array, weights: Weights, classes: Classes, class_: jax.Array) -> jax.Array:
    """Logits within given classes; -inf where a class has no such rank.

    Args:
        class_: int (...), in [0, C).

    Returns:
        float32 (..., R).
    """
    members_xR = classes.members[class_]
    tokens_xR = jnp.maximum(members_xR, 0)
    # Codebooks in front, as the product of slices leaves them: no table is transposed.
    table_MxK = code_logits(h, weights.codebooks)
    codes_xMxR = weights.member_codes[class_].astype(jnp.int32)
    codes_MxxR = jax.lax.optimization_barrier(jnp.moveaxis(codes_xMxR, -2, 0))
    z_xR = jnp.sum(jnp.take_along_axis(table_MxK, codes_MxxR, axis=-1), axis=0)
    if weights.scale is not None:
        z_xR = z_xR * weights.scale[tokens_xR]
    if weights.bias is not None:
        z_xR = z_xR + weights.bias[tokens_xR].astype(jnp.float32)
    return jnp.where(members_xR < 0, -jnp.inf, z_xR)


def code_logits(h: jax.Array, codebooks: jax.Array) -> jax.Array:
    """Products of the slices of h with the codebooks, float32 (M, ..., K)."""
    h_xMxW = h.reshape(*h.shape[:-1], *codebooks.shape[::2])
    return product(h_xMxW, codebooks, "...mw,mkw->m...k")
