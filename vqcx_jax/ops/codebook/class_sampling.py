"""The k most probable tokens of product codes in classes, without V logits.

A token is at most as probable as its class. Frequent tokens are looked at first, then classes from
the most to the least probable one, some at a time, until no further class is as probable as the
least of the k best tokens so far. How many classes that takes depends on the hidden states: few
where a model is sure, all of them at worst.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import classes as product_classes
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights, num_frequent
from vqcx_jax.ops.codebook.members.xla import code_logits, logits_of_classes
from vqcx_jax.ops.sampling import check_k, first_of_sorted

# Tokens of classes that are looked at together, and at most so many codes of theirs.
_TOKENS, _CODES = 512, 2**22

_Best = tuple[jax.Array, jax.Array]


def top_k(
    h: jax.Array, vectors: jax.Array, weights: Weights, classes: Classes, k: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and ids of the k most probable tokens; of equals, the lowest id first.

    Args:
        h: (..., D). vectors: from `classes.entry_vectors`.

    Returns:
        log_probs: float32 (..., k), from large to small. tokens: int32 (..., k).

    Raises:
        UserError: k is not in 1 .. V.
    """
    vocab_size, (num_classes, num_ranks) = len(classes.entry_of), classes.members.shape
    check_k(k, vocab_size)
    h_NxD = h.reshape(-1, h.shape[-1])
    entries = product_classes.entry_logits(h_NxD, vectors, weights, classes)
    log_p_NxE = jax.nn.log_softmax(entries)
    log_p_NxF, log_p_NxC = jnp.split(log_p_NxE, [num_frequent(classes)], axis=1)
    num_tokens = min(_TOKENS, _CODES // (len(h_NxD) * len(weights.codebooks)))
    at_a_time = min(num_classes, max(1, num_tokens // num_ranks))
    log_p_NxC, order_NxC = jax.lax.top_k(log_p_NxC, num_classes)
    padding = ((0, 0), (0, -num_classes % at_a_time))
    log_p_NxC = jnp.pad(log_p_NxC, padding, constant_values=-jnp.inf)
    order_NxC = jnp.pad(order_NxC, padding)
    tables_MxNxK = code_logits(h_NxD, weights.codebooks)

    def better(best: _Best, log_p_NxI: jax.Array, tokens_NxI: jax.Array) -> _Best:
        log_p, tokens = (
            jnp.concatenate(x, axis=1) for x in zip(best, (log_p_NxI, tokens_NxI), strict=True)
        )
        return first_of_sorted(log_p, tokens, k)

    def may_be_better(state: tuple[jax.Array, _Best]) -> jax.Array:
        first, (best_Nxk, _) = state
        next_N = jax.lax.dynamic_index_in_dim(log_p_NxC, first, axis=1, keepdims=False)
        is_some = jnp.any((next_N >= best_Nxk[:, -1]) & (next_N > -jnp.inf))
        return (first < num_classes) & is_some

    def with_next_classes(state: tuple[jax.Array, _Best]) -> tuple[jax.Array, _Best]:
        first, best = state
        class_NxG, of_class_NxG = (
            jax.lax.dynamic_slice_in_dim(x, first, at_a_time, axis=1)
            for x in (order_NxC, log_p_NxC)
        )
        z_NxGxR = logits_of_classes(tables_MxNxK, weights, classes, class_NxG)
        # Rounding must not make a token more probable than its class.
        of_token_NxGxR = jnp.minimum(jax.nn.log_softmax(z_NxGxR), 0.0)
        log_p_NxGxR = of_class_NxG[..., None] + of_token_NxGxR
        tokens_NxGxR = classes.members[class_NxG]
        tokens_NxGxR = jnp.where(tokens_NxGxR < 0, vocab_size, tokens_NxGxR)
        rows = len(h_NxD), -1
        return first + at_a_time, better(
            best, log_p_NxGxR.reshape(rows), tokens_NxGxR.reshape(rows)
        )

    none = (jnp.full((len(h_NxD), k), -jnp.inf), jnp.full((len(h_NxD), k), vocab_size))
    frequent = classes.entries[: num_frequent(classes)]
    best = better(none, log_p_NxF, jnp.broadcast_to(frequent, log_p_NxF.shape))
    _, (log_p_Nxk, tokens_Nxk) = jax.lax.while_loop(
        may_be_better, with_next_classes, (jnp.int32(0), best)
    )
    shape = *h.shape[:-1], k
    return log_p_Nxk.reshape(shape), tokens_Nxk.astype(jnp.int32).reshape(shape)
