"""Relative positions as rotations: Delta(P_mn) of CMHA and the whole of RoPE.

A head of width d is P = d/2 planes; plane i holds coordinates i and i + P (half-split pairing).
Queries and keys at position m are rotated by m * omega_i, so that their dot product depends on
m - n only (Su et al. 2021, "RoFormer").
"""

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops.attention.phase import position_angle
from vqcx_jax.ops.attention.planes import from_pair, multiply, table_for_heads, to_pair


def rope_frequencies(head_dim: int, base: float = 10_000.0, *, fraction: float = 1.0) -> jax.Array:
    """omega_i = base^(-2i/head_dim) for i < head_dim/2, in radians per position.

    Args:
        head_dim: d, even.
        base: the longest wavelength, over 2 pi.
        fraction: of the planes, the share that turns: floor(fraction * head_dim) // 2 of them. The
            others, of the lowest frequencies, get 0 and carry content only (p-RoPE, Barbero et
            al. 2024); 0 is no positions at all (NoPE).

    Returns:
        float32 (P,).

    Raises:
        UserError: fraction is not in [0, 1], or so small that no plane turns.
    """
    if not 0.0 <= fraction <= 1.0:
        raise UserError(f"fraction={fraction}: must be in [0, 1]")
    planes = jnp.arange(head_dim // 2, dtype=jnp.float32)
    # Of the fraction that was meant: 0.58 times 100 is 57.99999999999999 to a computer.
    num_turning = int(fraction * head_dim + 1e-6) // 2
    if num_turning == 0 and fraction > 0:
        raise UserError(f"fraction={fraction}: no plane of {head_dim // 2} turns; 0 asks for none")
    return jnp.where(planes < num_turning, base ** (-2.0 * planes / head_dim), 0.0)


def per_head_frequencies(
    num_heads: int, head_dim: int, base: float = 10_000.0, *, fraction: float = 1.0
) -> jax.Array:
    """omega_h,i = omega_i base^(-2h / (num_heads head_dim)), in radians per position.

    A head's frequencies lie evenly, on a logarithmic scale, between those of RoPE: all heads
    together have num_heads as many. Head 0 has RoPE's.

    Args:
        num_heads: key heads, as a query head must turn as its key head does.
        head_dim, base, fraction: as in `rope_frequencies`.

    Returns:
        float32 (num_heads, P).
    """
    shift = jnp.arange(num_heads, dtype=jnp.float32) / num_heads
    of_head = base ** (-2.0 * shift / head_dim)
    return of_head[:, None] * rope_frequencies(head_dim, base, fraction=fraction)


def rotary_table(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position times frequency.

    Args:
        positions: integer or float (..., T). Angles are float32 whatever the model's dtype:
            bfloat16 would round position 257 to 256. See `position_angle` for how exact they are.
        frequencies: float32 (P,), or (K, P) for frequencies of each key head.

    Returns:
        cos, sin: float32 (..., T, P), or (..., T, K, P).
    """
    positions = positions.astype(jnp.float32)
    positions = jnp.expand_dims(positions, tuple(range(-frequencies.ndim, 0)))
    angles = position_angle(positions, frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates every plane of every head.

    Args:
        x: (B, T, H, d).
        cos, sin: (B, T, P) or (T, P), from `rotary_table`, for all heads; or (B, T, K, P), of
            x's rank, for each key head, H a multiple of K.

    Returns:
        (B, T, H, d) in x's dtype; the arithmetic is float32.
    """
    table = table_for_heads(cos, x), table_for_heads(sin, x)
    return from_pair(multiply(to_pair(x), table)).astype(x.dtype)
