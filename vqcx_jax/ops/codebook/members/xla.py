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
    # Codebooks in front, as the product of slices leaves them: no table is transposed.
    tables = code_logits(h, weights.codebooks)
    return logits_of_classes(tables, weights, classes, class_[..., None])[..., 0, :]


def logits_of_classes(
    tables: jax.Array, weights: Weights, classes: Classes, class_: jax.Array
) -> jax.Array:
    """`logits` of several classes of each position.

    Args:
        tables: from `code_logits`. class_: int (..., G), in [0, C).

    Returns:
        float32 (..., G, R).
    """
    members_xGxR = classes.members[class_]
    tokens_xGxR = jnp.maximum(members_xGxR, 0)
    codes_xGxMxR = weights.codes.of_members[class_].astype(jnp.int32)
    codes_MxxGxR = jax.lax.optimization_barrier(jnp.moveaxis(codes_xGxMxR, -2, 0))
    *rows, num_classes, num_ranks = codes_MxxGxR.shape
    codes_MxxI = codes_MxxGxR.reshape(*rows, num_classes * num_ranks)
    z_xI = jnp.sum(jnp.take_along_axis(tables, codes_MxxI, axis=-1), axis=0)
    z_xGxR = z_xI.reshape(members_xGxR.shape)
    if weights.scale is not None:
        z_xGxR = z_xGxR * weights.scale[tokens_xGxR]
    if weights.bias is not None:
        z_xGxR = z_xGxR + weights.bias[tokens_xGxR].astype(jnp.float32)
    return jnp.where(members_xGxR < 0, -jnp.inf, z_xGxR)


def code_logits(h: jax.Array, codebooks: jax.Array) -> jax.Array:
    """Products of the slices of h with the codebooks, float32 (M, ..., K)."""
    h_xMxW = h.reshape(*h.shape[:-1], *codebooks.shape[::2])
    return product(h_xMxW, codebooks, "...mw,mkw->m...k")
