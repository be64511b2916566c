"""The polar form of planes, and the way back for gradients, as kernels take them.

On real and imaginary parts that are arrays of any layout: nothing here but arithmetic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.planes import Pair
from vqcx_jax.ops.attention.trig import arctan2


class Turn(NamedTuple):
    """What turning planes found out and the way back needs, float32 arrays of one shape.

    cos, sin: of the phases after the turn. theta: of those before; None if it was not needed.
    """

    cos: jax.Array
    sin: jax.Array
    theta: jax.Array | None


def polar(real: jax.Array, imag: jax.Array) -> Pair:
    """Radius and angle, float32 of any shape; the radius shares the quotient of `arctan2`."""
    abs_real, abs_imag = jnp.abs(real), jnp.abs(imag)
    larger = jnp.maximum(abs_real, abs_imag)
    is_tiny = larger < 1e-37
    t = jnp.where(is_tiny, 0.0, jnp.minimum(abs_real, abs_imag) / jnp.where(is_tiny, 1.0, larger))
    square = 1.0 + t * t
    return larger * (square * jax.lax.rsqrt(square)), arctan2(imag, real)


def pull_back_pair(
    x: Pair, delta: jax.Array, turn: Turn, cotangent: Pair
) -> tuple[Pair, jax.Array]:
    """The gradients by the parts of x, and by the phase of the result, of mu exp(i phase).

    Args:
        x: real and imaginary part before the turn, float32. delta: d phase / d theta, in a shape
            that broadcasts with them. turn: with theta. cotangent: of the parts of the result.

    Returns:
        two and one arrays of x's shape. At 0 as in `euler`.
    """
    real, imag = x
    along = turn.cos * cotangent[0] + turn.sin * cotangent[1]
    across = turn.cos * cotangent[1] - turn.sin * cotangent[0]
    # The unit vector of theta, by a division by the larger part first: squares of tiny numbers
    # would be 0.
    larger = jnp.maximum(jnp.abs(real), jnp.abs(imag))
    is_tiny = larger < 1e-37
    inverse = 1.0 / jnp.where(is_tiny, 1.0, larger)
    cos_theta = jnp.where(is_tiny, 1.0, real * inverse)
    sin_theta = jnp.where(is_tiny, 0.0, imag * inverse)
    square = cos_theta * cos_theta + sin_theta * sin_theta
    shrink = jax.lax.rsqrt(square)
    cos_theta, sin_theta = cos_theta * shrink, sin_theta * shrink
    d_phase = larger * (square * shrink) * across
    across = delta * across
    d_x = (cos_theta * along - sin_theta * across, sin_theta * along + cos_theta * across)
    return d_x, d_phase
