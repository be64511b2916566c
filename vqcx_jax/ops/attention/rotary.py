"""Relative positions as rotations: Delta(P_mn) of CMHA and the whole of RoPE.

A head of width d is P = d/2 planes; plane i holds coordinates i and i + P (half-split pairing).
Queries and keys at position m are rotated by m * omega_i, so that their dot product depends on
m - n only (Su et al. 2021, "RoFormer").
"""

import jax
import jax.numpy as jnp


def rope_frequencies(head_dim: int, base: float = 10_000.0) -> jax.Array:
    """omega_i = base^(-2i/head_dim) for i < head_dim/2, float32 (P,), in radians per position."""
    planes = jnp.arange(head_dim // 2, dtype=jnp.float32)
    return base ** (-2.0 * planes / head_dim)


def rotary_table(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency.

    Args:
        positions: integer or float (..., T). Angles are float32 whatever the model's dtype:
            bfloat16 would round position 257 to 256.
        frequencies: float32 (P,).

    Returns:
        cos, sin: float32 (..., T, P).
    """
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates every plane of every head.

    Args:
        x: (B, T, H, d).
        cos, sin: (B, T, P) or (T, P), from `rotary_table`.

    Returns:
        (B, T, H, d) in x's dtype; the arithmetic is float32.
    """
    real, imag = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([real * cos - imag * sin, real * sin + imag * cos], -1).astype(x.dtype)
