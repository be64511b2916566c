"""Tokens from code logits: the k most probable ones, and one drawn, without V logits.

Tokens of a code share its logit, so that within a code the order of tokens is that of their
biases and their distribution is softmax(bias / temperature), whatever the hidden state. Both are
tables: the tokens of each code side by side, the largest bias first, made once for many positions.

`top_k`. A token that comes i-th in the r-th best code has i + r better ones before it, those of
its own code and the best of r others; so k (k + 1) / 2 tokens of k codes hold the k best of all V.

`sampler`. p(v) = p(code) p(v | code): the code by its summed probability, then the token by a
binary search in the code's cumulative sums. Sums start anew in every code: those of one code would
drown in the roundings of a sum over all V. `cell_sampler` does the same for two codebooks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.ops.codebook.multi import CodeLogits
from vqcx_jax.ops.sampling import check_k, check_temperature, first_of_sorted


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


def top_k(code_logits: jax.Array, table: TokenTable, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the V logits code_logits[assignment[v]] + bias[v], and their tokens.

    Equal logits: the lowest token first, as in `jax.lax.top_k`. One exception: where the k-th
    place falls among tokens of one code whose different biases give equal float32 logits, those
    of larger bias are in.

    Args:
        code_logits: float32 (..., K).

    Returns:
        logits: float32 (..., k), from large to small. tokens: int32 (..., k).

    Raises:
        UserError: k is not in 1 .. V.
    """
    (vocab_size,) = table.tokens.shape
    check_k(k, vocab_size)
    num_codes = min(k, code_logits.shape[-1])
    if num_codes * (2 * k - num_codes + 1) // 2 < vocab_size:
        # top_k takes the first of equals, here the code whose first token is the lowest.
        best = (code_logits + table.best_bias)[..., table.by_first_token]
        codes = table.by_first_token[jax.lax.top_k(best, num_codes)[1]]
        rank = np.repeat(np.arange(num_codes), k - np.arange(num_codes))
        index = np.concatenate([np.arange(k - r) for r in range(num_codes)])
        codes = codes[..., rank]
        is_token = table.counts[codes] > index
        places = jnp.where(is_token, table.starts[codes] + index, 0)
    else:
        places = jnp.broadcast_to(jnp.arange(vocab_size), (*code_logits.shape[:-1], vocab_size))
        codes = table.codes[places]
        is_token = jnp.ones(places.shape, bool)
    z = jnp.take_along_axis(code_logits, codes, axis=-1) + table.bias[places]
    z = jnp.where(is_token, z, -jnp.inf)
    tokens = jnp.where(is_token, table.tokens[places], vocab_size)
    return first_of_sorted(z, tokens, k)


def sampler(
    table: TokenTable, temperature: float | jax.Array = 1.0
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function that draws tokens from softmax(z / temperature), z as in `top_k`.

    What does not depend on code logits is computed here, once. Probabilities are exact up to
    float32: within a code they come in steps of 2^-23, and one that underflows is never drawn.

    Args:
        temperature: 0: the first of `top_k`, whatever the key.

    Returns:
        (code_logits, key) -> tokens: float32 (..., K), a typed PRNG key, int32 (...).

    Raises:
        UserError: a temperature below 0, where it is a Python number.
    """
    check_temperature(temperature)
    temperature = jnp.asarray(temperature, jnp.float32)
    divisor = _divisor(temperature)
    log_mass, draw_within = _within(table, divisor)

    def draw(code_logits: jax.Array, key: jax.Array) -> jax.Array:
        code_key, token_key = jax.random.split(key)
        best = code_logits + table.best_bias
        relative = best - jnp.max(best, axis=-1, keepdims=True)
        code = jax.random.categorical(code_key, relative / divisor + log_mass)
        greedy = top_k(code_logits, table, 1)[1][..., 0]
        return jnp.where(temperature > 0, draw_within(code, token_key), greedy)

    return draw


def cell_sampler(
    assignment: jax.Array,
    num_codes: tuple[int, ...],
    bias: jax.Array,
    own_tokens: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
) -> Callable[[CodeLogits, jax.Array | None, jax.Array], jax.Array]:
    """`sampler` for two codebooks, or one, beside tokens with logits of their own.

    Tokens of a cell, those that share all codes, take the place of those of a code: a cell is drawn
    by its row, the first code, and then its column. K1 K2 numbers per position stand for V.

    Args:
        assignment: int (V, M), column m in [0, num_codes[m]); M = 1 or 2.
        bias: float32 (V,).
        own_tokens: int (T,), distinct tokens whose codes are not used; None: none.
        temperature: 0: the lowest token of the largest of the V logits, whatever the key.

    Returns:
        (code_logits, own_logits, key) -> tokens: M arrays float32 (..., K_m); float32 (..., T)
        with biases, or None without own tokens; a typed PRNG key; int32 (...).

    Raises:
        UserError: as `sampler`.
    """
    check_temperature(temperature)
    vocab_size, (num_rows, num_columns) = len(bias), (*num_codes, 1)[:2]
    cells = assignment[:, 0]
    if len(num_codes) == 2:
        cells = cells * num_columns + assignment[:, 1]
    if own_tokens is not None:
        bias = bias.at[own_tokens].set(-jnp.inf)
    table = token_table(cells, num_rows * num_columns, bias)
    temperature = jnp.asarray(temperature, jnp.float32)
    divisor = _divisor(temperature)
    log_mass, draw_within = _within(table, divisor)
    first_token = table.tokens[jnp.minimum(table.starts, vocab_size - 1)]
    best_bias_IxJ, log_mass_IxJ, first_token_IxJ = (
        x.reshape(num_rows, num_columns) for x in (table.best_bias, log_mass, first_token)
    )

    def cell_logits(
        code_logits: CodeLogits, own_logits: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Of the best token of each cell, (..., I, J), and the largest of all, (...)."""
        best = code_logits[0][..., :, None]
        if len(code_logits) == 2:
            best = best + code_logits[1][..., None, :]
        best = best + best_bias_IxJ
        peak = jnp.max(best, axis=(-2, -1))
        if own_logits is not None:
            peak = jnp.maximum(peak, jnp.max(own_logits, axis=-1))
        return best, peak

    def draw(code_logits: CodeLogits, own_logits: jax.Array | None, key: jax.Array) -> jax.Array:
        row_key, column_key, token_key = jax.random.split(key, 3)
        best, peak = cell_logits(code_logits, own_logits)
        tempered = (best - peak[..., None, None]) / divisor + log_mass_IxJ
        log_mass_of_rows = jnp.log(jnp.sum(jnp.exp(tempered), axis=-1))
        if own_logits is not None:  # As rows without columns.
            own = (own_logits - peak[..., None]) / divisor
            log_mass_of_rows = jnp.concatenate([log_mass_of_rows, own], axis=-1)
        row = jax.random.categorical(row_key, log_mass_of_rows)
        row_of_codes = jnp.minimum(row, num_rows - 1)
        columns = jnp.take_along_axis(tempered, row_of_codes[..., None, None], axis=-2)
        column = jax.random.categorical(column_key, columns[..., 0, :])
        token = draw_within(row_of_codes * num_columns + column, token_key)
        if own_tokens is not None:
            token = jnp.where(row < num_rows, token, own_tokens[row - num_rows])
        return token

    def greedy(code_logits: CodeLogits, own_logits: jax.Array | None, key: jax.Array) -> jax.Array:
        best, peak = cell_logits(code_logits, own_logits)
        is_best = best == peak[..., None, None]
        token = jnp.min(jnp.where(is_best, first_token_IxJ, vocab_size), axis=(-2, -1))
        if own_tokens is not None and own_logits is not None:
            of_own = jnp.where(own_logits == peak[..., None], own_tokens, vocab_size)
            token = jnp.minimum(token, jnp.min(of_own, axis=-1))
        return token

    return lambda *args: jax.lax.cond(temperature > 0, draw, greedy, *args)


def _divisor(temperature: jax.Array) -> jax.Array:
    return jnp.where(temperature > 0, temperature, 1.0)


def _within(
    table: TokenTable, divisor: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Of each code the log of its summed exp((bias - best bias) / divisor), float32 (K,).

    And a function that draws a token of given codes: (int (...), key) -> int32 (...).
    """
    mass = jnp.exp((table.bias - table.best_bias[table.codes]) / divisor)
    cumulative = _cumulative_within(mass, table.codes)
    # Masses descend: those that are not zero are the first ones of their code. (Of a code whose
    # biases are all -inf the masses are NaN, and none is counted.)
    num_drawable = jnp.zeros_like(table.counts).at[table.codes].add(mass > 0)
    last = jnp.maximum(table.starts + num_drawable - 1, 0)
    total = jnp.where(num_drawable > 0, cumulative[last], 0.0)

    def draw(code: jax.Array, key: jax.Array) -> jax.Array:
        target = jax.random.uniform(key, code.shape) * total[code]
        return table.tokens[_first_above(cumulative, target, table.starts[code], last[code])]

    return jnp.log(total), draw


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
