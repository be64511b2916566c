"""Queries and keys made position-aware, so that attention is an ordinary dot product.

All functions take q (B, T, H, d) and k (B, T, K, d), H a multiple of K, and cos, sin from
`rotary_table` at their positions: float32 (B, T, P) for all heads or (B, T, K, P) for each key
head, with P = d/2 planes (PoPE has d frequencies instead). They return q' and k' in the dtypes of q
and k. All arithmetic is float32 from one step to the next, so that results are rounded once.
Parameters that bend query and key phases alike belong to the key head, which serves all queries of
its group; those that only touch queries belong to the query head.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.euler import euler_adapt
from vqcx_jax.ops.attention.harmonics import key_harmonics, query_harmonics
from vqcx_jax.ops.attention.planes import (
    from_pair,
    per_query_head,
    smooth_amplitude,
    table_for_heads,
    to_pair,
    unit,
)
from vqcx_jax.ops.attention.pope import clamp_bias, pope_amplitude
from vqcx_jax.ops.attention.rotary import rotate
from vqcx_jax.ops.attention.smooth import smooth_adapt


def rope_queries_and_keys(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """RoPE: q and k rotated by their positions; q' . k' is `reference.rope_scores`."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def complex_queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """CMHA as published: q' . k' is `reference.complex_scores` of q and k.

    Args:
        q, k, cos, sin: as above.
        delta: (K, P); or (P,) for all heads, or (1,) for all planes, too (EulerFormer).
        bias: (H, P), (P,) or (1,), radians.

    Returns:
        q', k' of the shapes of q and k. With delta = 1 and bias = 0 this is RoPE.
    """
    q_adapted = euler_adapt(_wide(q), per_query_head(delta, q.shape[-2]), bias)
    return _rotated(q, q_adapted, cos, sin), _rotated(k, euler_adapt(_wide(k), delta), cos, sin)


def amplitude_queries_and_keys(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """CMHA with delta = 0, the harmonic r = 0 alone: `reference.harmonic_scores` with weights of 1.

    Args:
        q, k, cos, sin: as above.
        bias: (H, P) or (P,), radians.

    Returns:
        q', k' of the shapes of q and k.
    """
    amplitudes = smooth_amplitude(to_pair(q)), smooth_amplitude(to_pair(k))
    return _turned_amplitudes(q, k, amplitudes, cos, sin, bias)


def smooth_queries_and_keys(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array, a: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """CMHA with the smooth Adapt: q' . k' is `reference.smooth_scores` of q and k.

    Args:
        q, k, cos, sin: as above.
        a: (K, d) or (d,), the Moebius map of `smooth_adapt`.
        bias: (H, P) or (P,), radians.

    Returns:
        q', k' of the shapes of q and k. With a = 0 and bias = 0 this is RoPE.
    """
    q_adapted = smooth_adapt(_wide(q), per_query_head(a, q.shape[-2]), bias)
    return _rotated(q, q_adapted, cos, sin), _rotated(k, smooth_adapt(_wide(k), a), cos, sin)


def harmonic_queries_and_keys(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """CMHA with R harmonics: q' . k' is `reference.harmonic_scores` of q and k.

    Args:
        q, k, cos, sin: as above.
        weights, bias: (H, R, P) or (R, P) of harmonics r = 0 .. R-1; bias in radians.

    Returns:
        q' (B, T, H, R d) and k' (B, T, K, R d). With weights of 1 at r = 1 and 0 elsewhere, and
        bias = 0, their product is RoPE's.
    """
    num_harmonics = weights.shape[-2]
    cos, sin = jnp.tile(cos, num_harmonics), jnp.tile(sin, num_harmonics)
    return (
        _rotated(q, query_harmonics(_wide(q), weights, bias), cos, sin),
        _rotated(k, key_harmonics(_wide(k), num_harmonics), cos, sin),
    )


def pope_queries_and_keys(
    q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """PoPE: q' . k' is `reference.pope_scores` of q and k.

    Args:
        q, k: as above.
        cos, sin: of d frequencies, `pope_frequencies`: (B, T, d), or (B, T, K, d).
        bias: (H, d) or (d,), radians; clamped to [-2 pi, 0], see `pope.clamp_bias`.

    Returns:
        q' (B, T, H, 2d) and k' (B, T, K, 2d).
    """
    amplitudes = pope_amplitude(q), pope_amplitude(k)
    return _turned_amplitudes(q, k, amplitudes, cos, sin, clamp_bias(bias))


def _turned_amplitudes(
    q: jax.Array,
    k: jax.Array,
    amplitudes: tuple[jax.Array, jax.Array],
    cos: jax.Array,
    sin: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Queries at the phases of bias and position, keys at that of position, in their dtypes."""
    of_queries, of_keys = amplitudes
    bias_cos, bias_sin = unit(_wide(bias))
    q_turned = from_pair((of_queries * bias_cos, of_queries * bias_sin))
    k_turned = from_pair((of_keys * table_for_heads(cos, k), of_keys * table_for_heads(sin, k)))
    return _rotated(q, q_turned, cos, sin), k_turned.astype(k.dtype)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _rotated(original: jax.Array, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return rotate(x, cos, sin).astype(original.dtype)
