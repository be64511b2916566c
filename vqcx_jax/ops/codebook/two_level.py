"""Two levels: first the code of a token, then its rank within the code.

    p(v | h) = p(code(v) | h) p(rank(v) | code(v), h)
    p(code = k | h) = softmax_k(codes[k] . h + code_bias[k])
    p(rank = r | k, h) = softmax over ranks of code k of ranks[r] . (gates[k] * h) + bias[token]
Rank vectors are shared by all codes; each code's gate makes them mean something else. It is
normalised by construction, and costs O(K + R) per position, R the tokens of the largest code: with
K and R near sqrt(V) that is the least there is, but tokens of different codes share rank vectors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.errors import UserError
from vqcx_jax.ops.softmax.product import product


class Levels(NamedTuple):
    """A token map, read both ways.

    Attributes:
        codes, ranks: int32 (V,), of each token.
        tokens: int32 (K, R), the token of each code and rank; -1: none.
    """

    codes: jax.Array
    ranks: jax.Array
    tokens: jax.Array


class Weights(NamedTuple):
    """Attributes: codes, gates (K, D); ranks (R, D); code_bias (K,); bias (V,) or None."""

    codes: jax.Array
    gates: jax.Array
    ranks: jax.Array
    code_bias: jax.Array
    bias: jax.Array | None


def levels(
    assignment: np.ndarray, num_codes: int, num_ranks: int, order: np.ndarray | None = None
) -> Levels:
    """Ranks of tokens in their codes.

    Args:
        assignment: int (V,), values in [0, num_codes).
        num_ranks: R.
        order: int (V,), tokens from first to last rank; None: by id. With tokens in order of
            falling frequency a rank vector is shared by tokens that are about as frequent.

    Raises:
        UserError: a code has more than num_ranks tokens.
    """
    vocab_size = len(assignment)
    order = np.arange(vocab_size) if order is None else order
    codes = assignment[order]
    by_code = order[np.argsort(codes, kind="stable")]
    sizes = np.bincount(assignment, minlength=num_codes)
    starts = np.cumsum(sizes) - sizes
    ranks = np.empty(vocab_size, np.int32)
    ranks[by_code] = np.arange(vocab_size) - starts[assignment[by_code]]
    if sizes.max() > num_ranks:
        raise UserError(f"num_ranks={num_ranks}: must be at least {sizes.max()}, the largest code")
    tokens = np.full((num_codes, num_ranks), -1, np.int32)
    tokens[assignment, ranks] = np.arange(vocab_size)
    return Levels(*map(jnp.asarray, (assignment.astype(np.int32), ranks, tokens)))


def nll(h: jax.Array, weights: Weights, levels: Levels, targets: jax.Array) -> jax.Array:
    """-log p(target | h), float32 (...), for h (..., D) and targets int (...) in [0, V)."""
    code, rank = levels.codes[targets], levels.ranks[targets]
    log_p_code = jax.nn.log_softmax(code_logits(h, weights))
    log_p_rank = jax.nn.log_softmax(rank_logits(h, weights, levels, code))
    # Masked sums instead of gathers: their gradients are dense arithmetic, not scatters.
    return -(_pick(log_p_code, code) + _pick(log_p_rank, rank))


def log_probs(h: jax.Array, weights: Weights, levels: Levels) -> jax.Array:
    """Log p of all V tokens, float32 (..., V). O(V D) per position, as a full softmax."""
    log_p_code = jax.nn.log_softmax(code_logits(h, weights))
    h_xKxD = h[..., None, :] * weights.gates
    z_xKxR = product(h_xKxD, weights.ranks) + _bias_table(weights.bias, levels)
    is_empty_K = jnp.all(levels.tokens < 0, axis=-1)
    log_p_rank = jax.nn.log_softmax(jnp.where(is_empty_K[:, None], 0.0, z_xKxR))
    return log_p_code[..., levels.codes] + log_p_rank[..., levels.codes, levels.ranks]


def code_logits(h: jax.Array, weights: Weights) -> jax.Array:
    """Float32 (..., K); -inf for codes without tokens is the caller's matter (`code_bias`)."""
    return product(h, weights.codes) + weights.code_bias


def rank_logits(h: jax.Array, weights: Weights, levels: Levels, code: jax.Array) -> jax.Array:
    """Logits of the ranks within given codes; -inf where a code has no such rank.

    Args:
        code: int (...).

    Returns:
        float32 (..., R).
    """
    gated = h * weights.gates[code]
    return product(gated, weights.ranks) + _bias_table(weights.bias, levels)[code]


def _bias_table(bias: jax.Array | None, levels: Levels) -> jax.Array:
    is_token_KxR = levels.tokens >= 0
    values = jnp.float32(0) if bias is None else bias.astype(jnp.float32)[levels.tokens]
    return jnp.where(is_token_KxR, values, -jnp.inf)


def _pick(log_p: jax.Array, index: jax.Array) -> jax.Array:
    is_target = jnp.arange(log_p.shape[-1]) == index[..., None]
    return jnp.sum(jnp.where(is_target, log_p, 0.0), axis=-1)
