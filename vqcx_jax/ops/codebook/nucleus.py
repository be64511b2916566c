"""The nucleus of one codebook's tokens, without V logits.

As in `ops.sampling.nucleus`, its least logit is looked for among all float32 numbers, by halves.
The summed probability of the logits above a number is a sum over codes here: those of a code are
its first tokens in the table, and how many they are takes a binary search. What is known of one
number bounds the next search, so that there is little left to search soon.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook.token_table import Masses, TokenTable, mass_of_first
from vqcx_jax.ops.sampling.float_order import first_bounds, mean_place, number_at
from vqcx_jax.ops.sampling.nucleus import above_zero


def nucleus(
    code_logits: jax.Array,
    table: TokenTable,
    masses: Masses,
    divisor: jax.Array,
    top_p: float | jax.Array,
) -> jax.Array:
    """How many tokens of each code are in the nucleus: they are its first ones.

    The nucleus is that of `ops.sampling.nucleus` for the logits
    (code_logits[assignment[v]] + bias[v]) / divisor: the smallest set of the most probable tokens
    whose probabilities add up to top_p, and all that are as probable as the least of them.

    Args:
        code_logits: float32 (..., K).
        masses: of the table, with this divisor.
        top_p: in (0, 1]; 1: all tokens. Sums are float32: it is met to 1e-6 or so.

    Returns:
        int32 (..., K).
    """
    best = code_logits + table.best_bias
    peak = jnp.max(best, axis=-1, keepdims=True)
    weight = jnp.exp((best - peak) / divisor)  # Of a code; 0 without tokens.

    def mass(ends: jax.Array) -> jax.Array:
        """Of the tokens before these places, one for each code: (..., 1)."""
        of_codes = weight * mass_of_first(table, masses, ends - table.starts)
        return jnp.sum(of_codes, axis=-1, keepdims=True)

    def end_above(bound: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """The first place in low .. high of each code whose logit is not above the bound."""

        def halve(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = (low + high) // 2
            is_open, is_above = low < high, code_logits + table.bias[middle] > bound
            return (
                jnp.where(is_open & is_above, middle + 1, low),
                jnp.where(is_open & ~is_above, middle, high),
            )

        return jax.lax.while_loop(lambda ends: jnp.any(ends[0] < ends[1]), halve, (low, high))[0]

    ends_of_all = jnp.broadcast_to(table.starts + table.counts, code_logits.shape)
    top_p = above_zero(top_p)
    enough = top_p * mass(ends_of_all)

    State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

    def halve(state: State) -> State:
        """Above `low` there is enough, above `high` there is not; and where these tokens end."""
        low, high, ends_low, ends_high = state
        middle = mean_place(low, high)
        ends = end_above(number_at(middle), ends_high, ends_low)
        is_enough = mass(ends) >= enough
        return (
            jnp.where(is_enough, middle, low),
            jnp.where(is_enough, high, middle),
            jnp.where(is_enough, ends, ends_low),
            jnp.where(is_enough, ends_high, ends),
        )

    ends_of_none = jnp.broadcast_to(table.starts, code_logits.shape)
    state = *first_bounds(peak), ends_of_all, ends_of_none
    _, _, ends, _ = jax.lax.while_loop(lambda s: jnp.any(s[0] + 1 < s[1]), halve, state)
    return jnp.where(top_p >= 1, ends_of_all, ends) - table.starts
