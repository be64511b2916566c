"""The tokens that top-p leaves (Holtzman et al. 2020), without a sort.

The least logit of the nucleus is looked for among all float32 numbers, by halves: at most 32 sums
over the vocabulary, which take less time than a sort of it.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.sampling.float_order import first_bounds, mean_place, number_at


def nucleus(logits: jax.Array, top_p: float | jax.Array) -> jax.Array:
    """Logits with -inf outside of the nucleus.

    The nucleus is the smallest set of the most probable ids whose probabilities add up to top_p,
    and all that are as probable as the least of them: which ids it holds does not depend on how
    equals are ordered. Sums are float32: top_p is met to 1e-6 or so.

    Args:
        logits: float32 (..., V).
        top_p: in (0, 1]; 1 keeps everything. Below it, as may happen under jit, the most probable
            ids are left.

    Returns:
        float32 (..., V).
    """
    top_p = above_zero(top_p)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    enough = top_p * jnp.sum(weights, axis=-1, keepdims=True)

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Above `low` there is enough, above `high` there is not."""
        low, high = bounds
        middle = mean_place(low, high)
        above = jnp.where(logits > number_at(middle), weights, 0.0)
        is_enough = jnp.sum(above, axis=-1, keepdims=True) >= enough
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    bounds = first_bounds(peak)
    low, _ = jax.lax.while_loop(lambda b: jnp.any(b[0] + 1 < b[1]), halve, bounds)
    return jnp.where((logits > number_at(low)) | (top_p >= 1), logits, -jnp.inf)


def above_zero(top_p: float | jax.Array) -> jax.Array:
    """top_p as float32, so far above 0 that nuclei are not empty."""
    return jnp.maximum(jnp.asarray(top_p, jnp.float32), 1e-30)
