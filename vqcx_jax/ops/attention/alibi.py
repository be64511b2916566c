"""ALiBi: a penalty proportional to distance, added to the scores (Press et al. 2022)."""

import jax
import jax.numpy as jnp
import numpy as np


def alibi_slopes(num_heads: int) -> jax.Array:
    """The published slopes, float32 (H,).

    2^(-8h/H) for h = 1 .. H when H is a power of two. Otherwise those of the power of two below H,
    filled up with every other slope of the power above.
    """
    below = 1 << (num_heads.bit_length() - 1)
    slopes = _geometric(below)
    if below < num_heads:
        slopes = np.concatenate([slopes, _geometric(2 * below)[::2][: num_heads - below]])
    return jnp.asarray(slopes, jnp.float32)


def alibi_bias(slopes: jax.Array, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    """-slope |m - n|; causal attention sees m >= n only, where it is -slope (m - n).

    Args:
        slopes: (H,).
        q_positions: (B, T). k_positions: (B, S). B may be 1.

    Returns:
        float32 (B, H, T, S), for the `bias` of `attend`.
    """
    distance = q_positions[:, None, :, None] - k_positions[:, None, None, :]
    return -slopes[:, None, None] * jnp.abs(distance.astype(jnp.float32))


def _geometric(num_heads: int) -> np.ndarray:
    return 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
