"""Angles of positions, as exact far from the beginning as near it.

Position m and frequency omega give the angle m omega, of which only what is left after whole turns
counts. As one float32 product it would be rounded to 6e-8 of itself: to 6e-5 radians at 2,048.
"""

import jax
import jax.numpy as jnp

# 2 pi as a number of 8 bits, of which up to 2^16 turns are exact, and the rest.
_TURN = (6.28125, 0.0019353071795864769)


def position_angle(positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Position times frequency less whole turns, to 2^-31 of the position (2e-6 at 2^12) or 3e-7.

    Up to position 2^16: products with the first 8 bits of a frequency are exact so far, and all but
    a thousandth of their turns is taken off exactly. What the other bits give is below 1/128 of the
    position, and is rounded twice. Runs in Pallas kernels, too.

    Args:
        positions: float32, whole numbers. frequencies: float32, radians per position. Shapes that
            broadcast.

    Returns:
        float32, within half a turn and 1/128 of the position.
    """
    bits = jax.lax.bitcast_convert_type(frequencies, jnp.int32)
    # A mask, as compilers drop a conversion to bfloat16 and back.
    leading = jax.lax.bitcast_convert_type(bits & -0x10000, jnp.float32)
    angle = positions * leading
    turns = jnp.round(angle * (1 / (2 * jnp.pi)))
    for part in _TURN:
        angle = angle - turns * part
    return angle + positions * (frequencies - leading)
