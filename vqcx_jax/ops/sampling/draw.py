"""One id from each softmax, the step that all sampling ends with.

The reference is `jax.random.categorical`: noise for every id, and the largest sum. On CPUs that
noise was about half of a step of decoding, so that ids are drawn there by two random numbers,
whatever V is: first a block of about sqrt(V) ids by its summed probability, then an id of that
block, both by inversion: the first one whose cumulative sum exceeds a random share of the whole.
"""

import math

import jax
import jax.numpy as jnp

from vqcx_jax.ops import device

# So few ids are one block.
_ONE_BLOCK = 64


def draw(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Draws an id from softmax(logits), on CPUs without a random number for each id.

    On CPUs the probabilities of blocks, and those of ids within one, are whole steps of 2^-23, as
    their random numbers are; an id that underflows beside the largest is never drawn.

    Args:
        logits: float32 (..., V), of which some may be -inf.
        key: a typed PRNG key. Rows are independent.

    Returns:
        int32 (...). Some id in [0, V) where logits are NaN.
    """
    if device.current().platform != "cpu":
        return jax.random.categorical(key, logits).astype(jnp.int32)
    return _by_blocks(logits, key)


def _by_blocks(logits: jax.Array, key: jax.Array) -> jax.Array:
    *leading, vocab_size = logits.shape
    of_block, within = jax.random.uniform(key, (2, *leading))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    if vocab_size <= _ONE_BLOCK:
        return _first_above(of_block, weights)
    size = math.isqrt(vocab_size - 1) + 1
    num_blocks = -(-vocab_size // size)
    padding = [(0, 0)] * len(leading) + [(0, num_blocks * size - vocab_size)]
    weights_xBxI = jnp.pad(weights, padding).reshape(*leading, num_blocks, size)
    block = _first_above(of_block, jnp.sum(weights_xBxI, axis=-1))
    weights_xI = jnp.take_along_axis(weights_xBxI, block[..., None, None], axis=-2)[..., 0, :]
    return block * size + _first_above(within, weights_xI)


def _first_above(share: jax.Array, weights_xI: jax.Array) -> jax.Array:
    """The first index whose cumulative weight exceeds a share, in [0, 1), of all weights.

    Never one without a weight: cumulative sums are rounded, and may differ where nothing is added.
    """
    index_I = jnp.arange(weights_xI.shape[-1], dtype=jnp.int32)
    cumulative_xI = jnp.cumsum(weights_xI, axis=-1)
    target = share[..., None] * cumulative_xI[..., -1:]
    has_weight = weights_xI > 0
    last = jnp.max(jnp.where(has_weight, index_I, 0), axis=-1)
    above = jnp.where(has_weight & (cumulative_xI > target), index_I, last[..., None])
    return jnp.min(above, axis=-1)
