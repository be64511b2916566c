"""The formula in plain JAX: the whole cache is read, and masked."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops import attention


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    first: jax.Array | int,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
) -> jax.Array:
    """See `api.attend`; k and v are stacked.

    Values that are not seen are multiplied by 0, and must be finite.
    """
    k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
    num_queries, num_keys = q.shape[1], k.shape[1]
    mask = attention.causal_mask(num_queries, num_keys, first)
    if window is not None:
        mask &= attention.window_mask(num_queries, num_keys, window, first)
    bias = None
    if slopes is not None:
        q_index, k_index = first + jnp.arange(num_queries), jnp.arange(num_keys)
        bias = attention.alibi_bias(slopes, q_index[None], k_index[None])
    return attention.attend(q, k, v, mask, scale=scale, bias=bias, soft_cap=soft_cap)
