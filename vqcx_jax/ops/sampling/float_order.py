"""Float32 numbers by their place among all of them, for searches by halves."""

import jax
import jax.numpy as jnp
import numpy as np

_ALL_BUT_SIGN = np.int32(2**31 - 1)


def first_bounds(peak: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Places, int32, of -inf and of the largest logits: above one is all, above the other none."""
    return jnp.full_like(peak, place_of(jnp.float32(-jnp.inf)), jnp.int32), place_of(peak)


def place_of(x: jax.Array) -> jax.Array:
    """Of float32 numbers in the order of all of them, int32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ _ALL_BUT_SIGN, bits)


def number_at(place: jax.Array) -> jax.Array:
    """The float32 numbers at places."""
    bits = jnp.where(place < 0, place ^ _ALL_BUT_SIGN, place)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def mean_place(low: jax.Array, high: jax.Array) -> jax.Array:
    """Half-way between two places, rounded down; their sum might overflow."""
    return (low & high) + ((low ^ high) >> 1)
