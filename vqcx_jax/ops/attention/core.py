"""Masks and the softmax-weighted sum that every attention here ends in."""

import jax
import jax.numpy as jnp


def causal_mask(num_queries: int, num_keys: int, first_query: jax.Array | int = 0) -> jax.Array:
    """True where query t, standing at index first_query + t, may see key s: s <= index.

    Returns:
        bool (1, 1, T, S).
    """
    q_index = first_query + jnp.arange(num_queries)
    return (jnp.arange(num_keys) <= q_index[:, None])[None, None]


def segment_mask(q_segment_ids: jax.Array, k_segment_ids: jax.Array) -> jax.Array:
    """True where query and key belong to the same packed document.

    Args:
        q_segment_ids: int (B, T). k_segment_ids: int (B, S).

    Returns:
        bool (B, 1, T, S).
    """
    return (q_segment_ids[:, :, None] == k_segment_ids[:, None, :])[:, None]


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over the keys that `mask` shows; float32 softmax.

    Args:
        q: (B, T, H, d). k, v: (B, S, K, d) with H a multiple of K (grouped-query attention:
            query head h reads key head h // (H / K)).
        mask: bool, broadcastable to (B, H, T, S). Every query must see at least one key.

    Returns:
        (B, T, H, d) in q's dtype.
    """
    return jax.nn.dot_product_attention(q, k, v, mask=mask)
