"""Queries and keys made position-aware, so that attention is an ordinary dot product."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.euler import euler_adapt
from vqcx_jax.ops.attention.rotary import rotate


def rope_queries_and_keys(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """RoPE: q (B, T, H, d) and k (B, T, K, d) rotated by cos, sin (B, T, d/2)."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def complex_queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """CMHA: q' . k' is `reference.complex_scores` of q and k.

    Args:
        q: (B, T, H, d). k: (B, T, K, d), H a multiple of K.
        cos, sin: float32 (B, T, P) from `rotary_table`, P = d/2.
        delta: (K, P). It scales query and key phases alike, so it belongs to the key head.
        bias: (H, P), radians. It only turns queries, so it belongs to the query head.

    Returns:
        q', k' of the shapes and dtypes of q and k. With delta = 1 and bias = 0 this is RoPE.
    """
    q_delta = jnp.repeat(delta, bias.shape[0] // delta.shape[0], axis=0)
    # In float32 from one step to the next, so that the result is rounded once.
    q_float, k_float = q.astype(jnp.float32), k.astype(jnp.float32)
    q_turned = rotate(euler_adapt(q_float, q_delta, bias), cos, sin)
    k_turned = rotate(euler_adapt(k_float, delta), cos, sin)
    return q_turned.astype(q.dtype), k_turned.astype(k.dtype)
