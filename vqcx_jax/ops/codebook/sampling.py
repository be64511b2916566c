"""Tokens from code logits: the k most probable ones, and one drawn, without V logits.

Both go by tables of the tokens of each code, see `token_table`.

`top_k`. A token that comes i-th in the r-th best code has i + r better ones before it, those of
its own code and the best of r others; so k (k + 1) / 2 tokens of k codes hold the k best of all V.

`sampler`. p(v) = p(code) p(v | code): the code by its summed probability, then the token by a
binary search in the code's cumulative sums; with top_p, of those tokens alone that are in the
nucleus. `cell_sampler` does the same for two codebooks, without top_p.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.ops.codebook.multi import CodeLogits
from vqcx_jax.ops.codebook.nucleus import nucleus
from vqcx_jax.ops.codebook.token_table import (
    TokenTable,
    draw_within,
    mass_of_first,
    token_masses,
    token_table,
)
from vqcx_jax.ops.sampling import check_k, check_temperature, check_top_p, first_of_sorted

__all__ = ["TokenTable", "cell_sampler", "sampler", "token_table", "top_k"]


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
    table: TokenTable,
    temperature: float | jax.Array = 1.0,
    top_p: float | jax.Array | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function that draws tokens from softmax(z / temperature), z as in `top_k`.

    What does not depend on code logits is computed here, once. Probabilities are exact up to
    float32: within a code they come in steps of 2^-23, and one that underflows is never drawn.

    Args:
        temperature: 0: the first of `top_k`, whatever the key.
        top_p: only of the `nucleus`, which is found without V logits. None or 1: of all tokens.

    Returns:
        (code_logits, key) -> tokens: float32 (..., K), a typed PRNG key, int32 (...).

    Raises:
        UserError: as `ops.sampling.sample`.
    """
    check_temperature(temperature)
    check_top_p(top_p)
    temperature = jnp.asarray(temperature, jnp.float32)
    divisor = _divisor(temperature)
    masses = token_masses(table, divisor)
    log_mass_of_all = jnp.log(mass_of_first(table, masses, table.counts))

    def draw(code_logits: jax.Array, key: jax.Array) -> jax.Array:
        code_key, token_key = jax.random.split(key)
        best = code_logits + table.best_bias
        relative = best - jnp.max(best, axis=-1, keepdims=True)
        if top_p is None:
            code = jax.random.categorical(code_key, relative / divisor + log_mass_of_all)
            count = table.counts[code]
        else:
            counts = nucleus(code_logits, table, masses, divisor, top_p)
            log_mass = jnp.log(mass_of_first(table, masses, counts))
            code = jax.random.categorical(code_key, relative / divisor + log_mass)
            count = jnp.take_along_axis(counts, code[..., None], axis=-1)[..., 0]
        greedy = top_k(code_logits, table, 1)[1][..., 0]
        drawn = draw_within(table, masses, code, count, token_key)
        return jnp.where(temperature > 0, drawn, greedy)

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
    masses = token_masses(table, divisor)
    log_mass = jnp.log(mass_of_first(table, masses, table.counts))
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
        cell = row_of_codes * num_columns + column
        token = draw_within(table, masses, cell, table.counts[cell], token_key)
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
        return jnp.where(jnp.isnan(peak), 0, token)  # As argmax has it.

    return lambda *args: jax.lax.cond(temperature > 0, draw, greedy, *args)


def _divisor(temperature: jax.Array) -> jax.Array:
    return jnp.where(temperature > 0, temperature, 1.0)
