"""Queries and keys of unit mean square, against scores that grow without bound."""

import jax
import jax.numpy as jnp


def qk_norm(x: jax.Array, scale: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """RMS norm over the head width: x / sqrt(mean(x^2) + epsilon) * scale.

    Goes before the encoding of positions, which it would undo where that changes amplitudes (after
    Henry et al. 2020, "Query-key normalization").

    Args:
        x: (..., H, d) queries or keys.
        scale: (d,) shared by the heads, or (H, d).
        epsilon: keeps x = 0 at 0, with finite gradients.

    Returns:
        (..., H, d) in x's dtype; the arithmetic is float32.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale.astype(jnp.float32)).astype(x.dtype)
