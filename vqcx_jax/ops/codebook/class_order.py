"""Classes from the most to the least probable one, and their tokens, some classes at a time.

A token is at most as probable as its class, so that what is asked of the most probable tokens
needs few classes where a model is sure, and all of them at worst.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import classes as product_classes
from vqcx_jax.ops.codebook.class_arrays import Classes, Weights, num_frequent
from vqcx_jax.ops.codebook.members.xla import code_logits, logits_of_classes

# Tokens of classes that are looked at together, and at most so many codes of theirs.
_TOKENS, _CODES = 512, 2**22


class FirstLevel(NamedTuple):
    """What all questions about N hidden states begin with.

    Attributes:
        log_p_of_frequent: float32 (N, F).
        log_p_of_classes: float32 (N, C).
        tables: float32 (M, N, K), from `members.xla.code_logits`.
    """

    log_p_of_frequent: jax.Array
    log_p_of_classes: jax.Array
    tables: jax.Array


class Descent(NamedTuple):
    """Classes in the order of their probability, of each position.

    Attributes:
        classes: int32 (N, C + padding).
        log_p: float32 (N, C + padding), from large to small; -inf where there is no class.
        at_a_time: how many classes `tokens` looks at.
    """

    classes: jax.Array
    log_p: jax.Array
    at_a_time: int


def first_level(
    h_NxD: jax.Array, vectors: jax.Array, weights: Weights, classes: Classes
) -> FirstLevel:
    """Of hidden states (N, D), with `vectors` from `classes.entry_vectors`."""
    log_p_NxE = jax.nn.log_softmax(
        product_classes.entry_logits(h_NxD, vectors, weights, classes), axis=-1
    )
    log_p_NxF, log_p_NxC = jnp.split(log_p_NxE, [num_frequent(classes)], axis=1)
    return FirstLevel(log_p_NxF, log_p_NxC, code_logits(h_NxD, weights.codebooks))


def descent(level: FirstLevel, classes: Classes) -> Descent:
    """Where the most probable class of each position comes first."""
    num_classes, num_ranks = classes.members.shape
    num_codebooks, num_positions, _ = level.tables.shape
    num_tokens = min(_TOKENS, _CODES // max(1, num_positions * num_codebooks))
    at_a_time = min(num_classes, max(1, num_tokens // num_ranks))
    log_p_NxC, order_NxC = jax.lax.top_k(level.log_p_of_classes, num_classes)
    padding = ((0, 0), (0, -num_classes % at_a_time))
    return Descent(
        jnp.pad(order_NxC, padding),
        jnp.pad(log_p_NxC, padding, constant_values=-jnp.inf),
        at_a_time,
    )


def tokens(
    first: jax.Array, order: Descent, level: FirstLevel, weights: Weights, classes: Classes
) -> tuple[jax.Array, jax.Array]:
    """The tokens of the next classes of each position.

    Args:
        first: int32 (), a multiple of `order.at_a_time`: the place of the first class.

    Returns:
        log_p: float32 (N, I), of I = `order.at_a_time` R tokens. tokens: int32 (N, I). -inf and V
        where there is none.
    """
    class_NxG, of_class_NxG = (
        jax.lax.dynamic_slice_in_dim(x, first, order.at_a_time, axis=1)
        for x in (order.classes, order.log_p)
    )
    z_NxGxR = logits_of_classes(level.tables, weights, classes, class_NxG)
    # Rounding must not make a token more probable than its class.
    of_token_NxGxR = jnp.minimum(jax.nn.log_softmax(z_NxGxR), 0.0)
    log_p_NxGxR = of_class_NxG[..., None] + of_token_NxGxR
    tokens_NxGxR = classes.members[class_NxG]
    tokens_NxGxR = jnp.where(tokens_NxGxR < 0, len(classes.entry_of), tokens_NxGxR)
    rows = len(class_NxG), class_NxG.shape[1] * classes.members.shape[1]
    return log_p_NxGxR.reshape(rows), tokens_NxGxR.reshape(rows)
