"""A head of width d as P = d/2 complex numbers, kept as pairs of real float32 arrays.

Plane i holds coordinates i and i + P (half-split pairing): the real and the imaginary part. Pairs
instead of complex dtypes: kernels take no complex numbers, and gradients need no conjugates.
"""

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]

# A phase has no meaning at 0. Encodings that must be smooth there divide by
# sqrt(|x|^2 + EPSILON^2) in place of |x|. Queries and keys are of order 1, and a bfloat16
# projection of order 1 is off by 2^-9 = 2e-3: the phase of a plane smaller than EPSILON is noise.
EPSILON = 1e-3


def to_pair(x: jax.Array) -> Pair:
    """(..., 2P) in any dtype to real and imaginary part, float32 (..., P) each."""
    real, imag = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return real, imag


def from_pair(pair: Pair) -> jax.Array:
    """Real and imaginary part (..., P) to (..., 2P)."""
    return jnp.concatenate(pair, axis=-1)


def multiply(x: Pair, y: Pair) -> Pair:
    """The complex product."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


def unit(angle: jax.Array) -> Pair:
    """e^{i angle}."""
    return jnp.cos(angle), jnp.sin(angle)


def smooth_amplitude(x: Pair) -> jax.Array:
    """sqrt(|x|^2 + EPSILON^2): |x| to 1e-6 relative for |x| = 1, smooth and never 0.

    |x| must be below 1e19, whose square overflows.
    """
    return jnp.sqrt(x[0] ** 2 + x[1] ** 2 + EPSILON**2)


def direction(x: Pair) -> Pair:
    """X / |x|, made smooth by `smooth_amplitude`: 0 at 0."""
    amplitude = smooth_amplitude(x)
    return x[0] / amplitude, x[1] / amplitude


def table_for_heads(table: jax.Array, x: jax.Array) -> jax.Array:
    """A `rotary_table` (B, T, P), (T, P) or (B, T, K, P) that broadcasts with x (B, T, H, P)."""
    if table.ndim < x.ndim:
        return table[..., None, :]
    return per_query_head(table, x.shape[-2])


def per_query_head(x: jax.Array, num_heads: int) -> jax.Array:
    """What belongs to key heads, (..., K, P), for each query head, (..., H, P).

    Query head h reads key head h // (H / K). (P,), shared by all heads, stays (P,).
    """
    return x if x.ndim == 1 else jnp.repeat(x, num_heads // x.shape[-2], axis=-2)
