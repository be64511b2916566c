"""Arctangent, cosine and sine for float32 arrays of any size, as polynomials.

XLA's own hold for any argument, infinite and huge ones too, to the last bit, and are slow for it on
CPUs; phases of queries and keys need neither. The coefficients are minimax fits of relative error,
in powers of the squared argument, off by 3e-9 and less: what remains of the error
is the rounding of float32.
"""

import jax
import jax.numpy as jnp

# (atan(t) / t - 1) / t^2 for t in [0, 1].
_ATAN = (
    -0.33333298563957214,
    0.19998548924922943,
    -0.14264242351055145,
    0.10952185839414597,
    -0.0840345025062561,
    0.05795758590102196,
    -0.031177837401628494,
    0.01091460045427084,
    -0.0017936202930286527,
)
# (sin(r) / r - 1) / r^2 and (cos(r) - 1 + r^2 / 2) / r^4 for |r| <= pi / 4.
_SIN = (-0.16666655242443085, 0.00833215843886137, -0.00019514956511557102)
_COS = (0.04166664555668831, -0.0013887364184483886, 2.4438089894829318e-05)
# pi / 2 as a number of 8 bits, whose products with integers up to 2^16 are exact, and the rest.
_QUARTER_TURN = 1.5703125
_QUARTER_TURN_REST = 4.8382679489661923e-4


def arctan2(y: jax.Array, x: jax.Array) -> jax.Array:
    """The angle of (x, y) in [-pi, pi], float32, to 4e-7.

    0 where both are smaller than 1e-37, where numbers lose their precision and some processors
    take them for 0.
    """
    abs_x, abs_y = jnp.abs(x), jnp.abs(y)
    larger = jnp.maximum(abs_x, abs_y)
    # NaN is not below, and stays.
    is_tiny = larger < 1e-37
    t = jnp.where(is_tiny, 0.0, jnp.minimum(abs_x, abs_y) / jnp.where(is_tiny, 1.0, larger))
    angle = t + t * t * t * _polynomial(_ATAN, t * t)
    angle = jnp.where(abs_y > abs_x, jnp.pi / 2 - angle, angle)
    angle = jnp.where(is_tiny, 0.0, jnp.where(x < 0, jnp.pi - angle, angle))
    is_negative = jax.lax.bitcast_convert_type(y, jnp.int32) < 0  # The sign bit, of -0.0 too.
    return jnp.where(is_negative, -angle, angle)


def cos_sin(angle: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of float32 angles, to 2e-7 for |angle| < 1e4."""
    turns = jnp.round(angle * (2 / jnp.pi))
    r = (angle - turns * _QUARTER_TURN) - turns * _QUARTER_TURN_REST
    z = r * r
    sin = r + r * z * _polynomial(_SIN, z)
    cos = 1.0 - 0.5 * z + z * z * _polynomial(_COS, z)
    quadrant = turns.astype(jnp.int32)
    is_odd = (quadrant & 1) == 1
    sin, cos = jnp.where(is_odd, cos, sin), jnp.where(is_odd, sin, cos)
    sin = jnp.where((quadrant & 2) == 2, -sin, sin)
    cos = jnp.where(((quadrant + 1) & 2) == 2, -cos, cos)
    return cos, sin


def _polynomial(coefficients: tuple[float, ...], z: jax.Array) -> jax.Array:
    value = jnp.full_like(z, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * z + coefficient
    return value
