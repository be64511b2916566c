"""The formula in plain JAX: queries and keys are turned, then attended to."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops import attention


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    frequencies: jax.Array,
    delta: jax.Array | None,
    bias: jax.Array | None,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See `api.attend`."""
    table = attention.rotary_table(positions, frequencies)
    if delta is None and bias is None:
        q, k = attention.rope_queries_and_keys(q, k, *table)
    else:
        num_planes = q.shape[-1] // 2
        delta = jnp.ones((num_planes,), jnp.float32) if delta is None else delta
        bias = jnp.zeros((num_planes,), jnp.float32) if bias is None else bias
        q, k = attention.complex_queries_and_keys(q, k, *table, delta, bias)
    length = q.shape[1]
    masks = []
    if causal:
        masks.append(attention.causal_mask(length, length))
    if window is not None:
        masks.append(attention.window_mask(length, length, window))
    if segment_ids is not None:
        masks.append(attention.segment_mask(segment_ids, segment_ids))
    mask = None
    for shown in masks:
        mask = shown if mask is None else mask & shown
    return attention.attend(q, k, v, mask, scale=scale, soft_cap=soft_cap)
