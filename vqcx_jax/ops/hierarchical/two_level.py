"""Classes of tokens (Goodman 2001): p(token | h) = p(class | h) p(token | class, h).

Classes are S = ceil(sqrt V) neighbours by frequency: rank r is token r % S of class r // S. Both
softmaxes have about sqrt V terms.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.ops.checks import check_targets, check_width
from vqcx_jax.ops.hierarchical.grouping import block_size, make_blocks
from vqcx_jax.ops.labels import nan_unless_tokens
from vqcx_jax.ops.product import product
from vqcx_jax.ops.softmax import full
from vqcx_jax.ops.varying import varying_like


class TwoLevelWeights(NamedTuple):
    """C classes of S tokens; the last class may have fewer, its other rows are not used.

    Attributes:
        classes: (C, D). tokens: (C, S, D). Gradients are summed in their dtype, float32 for that
            reason; products are of the dtype of h.
        class_bias: float32 (C,) or None. token_bias: float32 (C, S) or None.
    """

    classes: jax.Array
    tokens: jax.Array
    class_bias: jax.Array | None = None
    token_bias: jax.Array | None = None


def class_size(vocab_size: int) -> int:
    """S, of C = ceil(V / S) classes."""
    return math.isqrt(vocab_size - 1) + 1


def nll(h: jax.Array, weights: TwoLevelWeights, ranks: jax.Array, vocab_size: int) -> jax.Array:
    """-log p(rank | h), O(sqrt V) per position.

    Positions are grouped by the target's class, so that each class's rows are read once for all
    of its positions (see `grouping`): at most twice the products that are needed.

    Args:
        h: (..., D). ranks: int (...), values in [0, V).

    Returns:
        float32 (...).

    Raises:
        UserError: h is not as wide as the rows, or ranks are not one for each h; where they are
            known, ranks out of range (under jit their nll is NaN).
    """
    check_width(h, weights.tokens)
    check_targets(ranks, vocab_size, h.shape[:-1], "ranks")
    weights = jax.tree.map(lambda w: varying_like(w, h), weights)
    num_classes, size, dim = weights.tokens.shape
    h_NxD, rank_N = h.reshape(-1, dim), ranks.reshape(-1)
    class_N, token_N = rank_N // size, rank_N % size
    classes = weights.classes.astype(h.dtype)
    class_nll_N, _ = full.nll(h_NxD, classes, class_N, weights.class_bias)

    block = block_size(h_NxD.shape[0], num_classes)
    slot_N, class_of_block_G = make_blocks(class_N, num_classes, block)
    num_blocks = class_of_block_G.shape[0]
    padded = jnp.zeros_like(h_NxD, shape=(num_blocks * block, dim)).at[slot_N].set(h_NxD)
    h_GxBxD = padded.reshape(num_blocks, block, dim)
    rows_GxSxD = weights.tokens[class_of_block_G].astype(h.dtype)
    z_GxBxS = jax.vmap(product)(h_GxBxD, rows_GxSxD)
    z_NxS = z_GxBxS.reshape(-1, size)[slot_N]
    if weights.token_bias is not None:
        z_NxS = z_NxS + weights.token_bias[class_N]
    z_NxS = jnp.where(_is_token(num_classes, size, vocab_size)[class_N], z_NxS, -jnp.inf)
    log_p_NxS = jax.nn.log_softmax(z_NxS, axis=-1)
    token_nll_N = -jnp.take_along_axis(log_p_NxS, token_N[:, None], axis=-1)[:, 0]
    nll = (class_nll_N + token_nll_N).reshape(ranks.shape)
    return nan_unless_tokens(nll, ranks, vocab_size)


def log_probs(h: jax.Array, weights: TwoLevelWeights, vocab_size: int) -> jax.Array:
    """Log p of every token, by rank.

    Args:
        h: (..., D).

    Returns:
        float32 (..., V).
    """
    num_classes, size, dim = weights.tokens.shape
    classes = full.logits(h, weights.classes.astype(h.dtype), weights.class_bias)
    rows = weights.tokens.reshape(-1, dim).astype(h.dtype)
    z = product(h, rows).reshape(*h.shape[:-1], num_classes, size)
    if weights.token_bias is not None:
        z = z + weights.token_bias
    z = jnp.where(_is_token(num_classes, size, vocab_size), z, -jnp.inf)
    log_p = jax.nn.log_softmax(classes, axis=-1)[..., None] + jax.nn.log_softmax(z, axis=-1)
    return log_p.reshape(*h.shape[:-1], num_classes * size)[..., :vocab_size]


def _is_token(num_classes: int, size: int, vocab_size: int) -> jax.Array:
    return (jnp.arange(num_classes * size) < vocab_size).reshape(num_classes, size)
