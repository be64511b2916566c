"""Tokens of each code side by side, the largest bias first: what sampling from codes goes by.

Tokens of a code share its logit, so that within a code the order of tokens is that of their
biases and their distribution is softmax(bias / temperature), whatever the hidden state. Both are
tables, made once for many positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class TokenTable(NamedTuple):
    """Tokens by code, then by bias from large to small, then by id; and where each code begins.

    Attributes:
        tokens, codes: int32 (V,), a token and its code. bias: float32 (V,), that of the token.
        starts, counts: int32 (K,), the place of a code's first token, and how many it has.
        best_bias: float32 (K,), the largest bias; -inf for a code without tokens.
        by_first_token: int32 (K,), codes ordered by the id of their first token.
    """

    tokens: jax.Array
    codes: jax.Array
    bias: jax.Array
    starts: jax.Array
    counts: jax.Array
    best_bias: jax.Array
    by_first_token: jax.Array


def token_table(assignment: jax.Array, num_codes: int, bias: jax.Array | None = None) -> TokenTable:
    """The table of a token map and its biases, by one sort of V tokens.

    Args:
        assignment: int (V,), values in [0, num_codes).
        bias: (V,) or None for zero.
    """
    (vocab_size,) = assignment.shape
    ids = jnp.arange(vocab_size, dtype=jnp.int32)
    if bias is None:
        bias = jnp.zeros(assignment.shape, jnp.float32)
    keys = (assignment.astype(jnp.int32), -bias.astype(jnp.float32), ids)
    codes, negative_bias, tokens = jax.lax.sort(keys, num_keys=3)
    counts = jnp.zeros((num_codes,), jnp.int32).at[codes].add(1)
    starts = jnp.cumsum(counts, dtype=jnp.int32) - counts
    first = jnp.minimum(starts, vocab_size - 1)
    first_token = jnp.where(counts > 0, tokens[first], vocab_size)
    return TokenTable(
        tokens=tokens,
        codes=codes,
        bias=-negative_bias,
        starts=starts,
        counts=counts,
        best_bias=jnp.where(counts > 0, -negative_bias[first], -jnp.inf),
        by_first_token=jnp.argsort(first_token).astype(jnp.int32),
    )


class Masses(NamedTuple):
    """Of a table's tokens: exp((bias - best bias of the code) / divisor).

    Attributes:
        cumulative: float32 (V,), summed from the first token of a code. Sums start anew in every
            code: those of one code would drown in the roundings of a sum over all V.
        drawable: int32 (K,), how many tokens of a code have a mass: the first ones, as masses
            descend.
    """

    cumulative: jax.Array
    drawable: jax.Array


def token_masses(table: TokenTable, divisor: jax.Array) -> Masses:
    """Masses at a temperature, float32 () above 0."""
    mass = jnp.exp((table.bias - table.best_bias[table.codes]) / divisor)
    # Of a code whose biases are all -inf the masses are NaN, and none is counted.
    drawable = jnp.zeros_like(table.counts).at[table.codes].add(mass > 0)
    return Masses(_cumulative_within(mass, table.codes), drawable)


def mass_of_first(table: TokenTable, masses: Masses, counts: jax.Array) -> jax.Array:
    """The summed mass of the first `counts` tokens of each code, int (..., K): float32 (..., K)."""
    _, total = _last_and_total(masses, table.starts, jnp.minimum(counts, masses.drawable))
    return total


def draw_within(
    table: TokenTable, masses: Masses, code: jax.Array, count: jax.Array, key: jax.Array
) -> jax.Array:
    """A token of each given code, int (...), among its first `count` ones: int32 (...)."""
    start = table.starts[code]
    last, total = _last_and_total(masses, start, jnp.minimum(count, masses.drawable[code]))
    target = jax.random.uniform(key, code.shape) * total
    return table.tokens[_first_above(masses.cumulative, target, start, last)]


def _last_and_total(
    masses: Masses, start: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The place of the last of `count` tokens from a code's start, and their summed mass."""
    last = jnp.maximum(start + count - 1, 0)
    return last, jnp.where(count > 0, masses.cumulative[last], 0.0)


def _cumulative_within(mass_V: jax.Array, codes_V: jax.Array) -> jax.Array:
    """Cumulative sums that start anew where the code changes."""
    Sums = tuple[jax.Array, jax.Array]  # A sum, and whether a code began since.

    def join(left: Sums, right: Sums) -> Sums:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    begins_V = codes_V != jnp.roll(codes_V, 1)
    return jax.lax.associative_scan(join, (mass_V, begins_V))[0]


def _first_above(
    cumulative_V: jax.Array, target: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """The first place in low .. high whose cumulative sum exceeds target; high if none does."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        is_right = (cumulative_V[middle] <= target) & (low < high)
        return jnp.where(is_right, middle + 1, low), jnp.where(is_right, high, middle)

    # Unrolled: on a GPU, one program instead of a few for each step.
    steps = len(cumulative_V).bit_length()
    return jax.lax.fori_loop(0, steps, halve, (low, high), unroll=True)[0]
