"""Tokens from code logits: the k most probable ones, and one drawn, without V logits.

Both go by tables of the tokens of each code, see `token_table`.

`top_k`. A token that comes i-th in the r-th best code has i + r better ones before it, those of
its own code and the best of r others; so k (k + 1) / 2 tokens of k codes hold the k best of all V.

`sampler`. p(v) = p(code) p(v | code): the code by its summed probability, then the token by a
binary search in the code's cumulative sums; with top_p, of those tokens alone that are in the
nucleus. Two codebooks: `cell_sampling`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.ops import sampling
from vqcx_jax.ops.codebook.nucleus import nucleus
from vqcx_jax.ops.codebook.token_table import (
    TokenTable,
    draw_within,
    mass_of_first,
    token_masses,
    token_table,
)

__all__ = ["TokenTable", "sampler", "token_table", "top_k"]


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
    sampling.check_k(k, vocab_size)
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
    return sampling.first_of_sorted(z, tokens, k)


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
    sampling.check_temperature(temperature)
    sampling.check_top_p(top_p)
    temperature = jnp.asarray(temperature, jnp.float32)
    divisor = sampling.divisor(temperature)
    masses = token_masses(table, divisor)
    log_mass_of_all = jnp.log(mass_of_first(table, masses, table.counts))

    def draw(code_logits: jax.Array, key: jax.Array) -> jax.Array:
        code_key, token_key = jax.random.split(key)
        best = code_logits + table.best_bias
        relative = best - jnp.max(best, axis=-1, keepdims=True)
        if top_p is None:
            code = sampling.draw(relative / divisor + log_mass_of_all, code_key)
            count = table.counts[code]
        else:
            counts = nucleus(code_logits, table, masses, divisor, top_p)
            log_mass = jnp.log(mass_of_first(table, masses, counts))
            code = sampling.draw(relative / divisor + log_mass, code_key)
            count = jnp.take_along_axis(counts, code[..., None], axis=-1)[..., 0]
        return draw_within(table, masses, code, count, token_key)

    def greedy(code_logits: jax.Array, _: jax.Array) -> jax.Array:
        return top_k(code_logits, table, 1)[1][..., 0]

    return lambda *args: jax.lax.cond(temperature > 0, draw, greedy, *args)
