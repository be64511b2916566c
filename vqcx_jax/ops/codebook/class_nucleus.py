"""Whether tokens of product codes in classes are in the nucleus (top-p), without V logits.

A token is in it if all that are more probable have less than top_p together. Classes that are less
probable than the token hold none of those; and of a class whose tokens have not been looked at, the
summed weight is known between bounds, so that few classes decide for most tokens.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import class_order
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights, num_frequent
from vqcx_jax.ops.codebook.class_order import FirstLevel
from vqcx_jax.ops.sampling.nucleus import above_zero


def in_nucleus(
    level: FirstLevel,
    weights: Weights,
    classes: Classes,
    tokens_N: jax.Array,
    log_p_N: jax.Array,
    asked_N: jax.Array,
    power: jax.Array,
    top_p: float | jax.Array,
) -> jax.Array:
    """Whether tokens are asked for and in the nucleus of p(v)^power (`ops.sampling.nucleus`).

    Args:
        level: of the N positions. tokens_N, log_p_N: a token of each, and its log-probability.
        asked_N: bool (N,), which are asked for: no class is looked at for others.
        power: float32 (), above 0: the reciprocal of a temperature.
        top_p: in (0, 1]; 1: all are. Sums are float32: it is met to 1e-6 or so.

    Returns:
        bool (N,).
    """
    top_p = above_zero(top_p)
    order = class_order.descent(level, classes)
    num_classes, num_ranks = classes.members.shape
    log_p_NxF = level.log_p_of_frequent

    def weight(log_p: jax.Array) -> jax.Array:
        """Over that of our token: where it is inf, so much more probable ones leave no place."""
        return jnp.exp(power * (log_p - log_p_N[:, None]))

    def sums(log_p_NxI: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the weights of tokens: of those more probable than ours, and of all."""
        weight_NxI = weight(log_p_NxI)
        is_above = (log_p_NxI > log_p_N[:, None]) & (ids != tokens_N[:, None])
        return jnp.sum(jnp.where(is_above, weight_NxI, 0.0), axis=1), jnp.sum(weight_NxI, axis=1)

    # Weights of tokens of a class add up to weight(class) at the least times `fewest`, at the most
    # times `most`: were all of it one token's, or all tokens alike.
    alike = jnp.exp((1.0 - power) * jnp.log(jnp.float32(num_ranks)))
    fewest, most = jnp.minimum(alike, 1.0), jnp.maximum(alike, 1.0)
    # Of classes from each one on; 0 from the end on.
    rest_NxC1 = jnp.pad(jnp.cumsum(weight(order.log_p)[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))
    num_above_N = jnp.sum(order.log_p > log_p_N[:, None], axis=1)

    State = tuple[jax.Array, jax.Array, jax.Array]

    def verdicts(state: State) -> tuple[jax.Array, jax.Array]:
        """Who is surely in, and who is surely out."""
        first, above_N, known_N = state
        rest_N, below_N = (
            jnp.take_along_axis(rest_NxC1, place_N[:, None], axis=1)[:, 0]
            for place_N in (jnp.full_like(num_above_N, first), jnp.maximum(num_above_N, first))
        )
        above_at_most_N = above_N + most * (rest_N - below_N)
        is_in_N = above_at_most_N < top_p * (known_N + fewest * rest_N)
        is_out_N = above_N >= top_p * (known_N + most * rest_N)
        return is_in_N | (top_p >= 1), is_out_N

    def is_open(state: State) -> jax.Array:
        is_in_N, is_out_N = verdicts(state)
        return (state[0] < num_classes) & jnp.any(asked_N & ~is_in_N & ~is_out_N)

    def look_further(state: State) -> State:
        first, above_N, known_N = state
        more_above_N, more_N = sums(*class_order.tokens(first, order, level, weights, classes))
        return first + order.at_a_time, above_N + more_above_N, known_N + more_N

    frequent = classes.entries[: num_frequent(classes)]
    state = jax.lax.while_loop(is_open, look_further, (jnp.int32(0), *sums(log_p_NxF, frequent)))
    return asked_N & verdicts(state)[0]
