"""The formula in plain JAX: queries and keys are turned, then attended to."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops import attention
from vqcx_jax.ops.flash_attention.amplitude import Amplitude, check, num_planes


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
    amplitude: Amplitude | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """See `api.attend`."""
    check(amplitude, delta)
    zeros_P = jnp.zeros((num_planes(q.shape[-1], amplitude),), jnp.float32)
    table = attention.rotary_table(positions, frequencies)
    if amplitude is None and delta is None and bias is None:
        q, k = attention.rope_queries_and_keys(q, k, *table)
    else:
        bias = zeros_P if bias is None else bias
        match amplitude:
            case "softplus":
                q, k = attention.pope_queries_and_keys(q, k, *table, bias)
            case "modulus":
                q, k = attention.amplitude_queries_and_keys(q, k, *table, bias)
            case None:
                delta = jnp.ones_like(zeros_P) if delta is None else delta
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
