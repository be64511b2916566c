"""Product codes in classes: all the codes of `multi`, without a sum over the vocabulary.

Frequent tokens stand beside classes of all others:
    p(v | h) = p(v | h) of the first level                for a frequent token,
    p(v | h) = p(class of v | h) p(v | its class, h)      for every other one.
The first level is a softmax over F frequent tokens and C classes, the second one over the tokens of
a class; both are of the logits
    z_n = scale[n] concatenate_m(codebooks[m][codes[n, m]]) . h + bias[n]
of nodes n. A node is a token (n < V) or a class (n = V + c): classes have codes in the same
codebooks, so that they add no vectors. A position costs (F + C + K) D operations and R M gathers, R
the tokens of the largest class, where a full softmax has V D operations. With F and C of a few
sqrt(V), R is less than sqrt(V).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.softmax.product import product


class Classes(NamedTuple):
    """Where tokens stand.

    Attributes:
        entries: int32 (F + C,), nodes of the first level: frequent tokens, then classes.
        entry_of: int32 (V,), of each token: its own entry, or that of its class.
        members: int32 (C, R), the tokens of each class; -1: none.
        rank_of: int32 (V,), place of each token in its class; 0 for frequent ones.
    """

    entries: jax.Array
    entry_of: jax.Array
    members: jax.Array
    rank_of: jax.Array


class Weights(NamedTuple):
    """Attributes: codebooks (M, K, D / M); codes int (V + C, M); scale, bias (V + C,) or None."""

    codebooks: jax.Array
    codes: jax.Array
    scale: jax.Array | None
    bias: jax.Array | None


def arrange(class_of: np.ndarray, num_classes: int, num_ranks: int | None = None) -> Classes:
    """Reads a map from tokens to classes in all directions.

    Args:
        class_of: int (V,), the class of each token; -1: none, it is a frequent one.
        num_classes: C.
        num_ranks: R; None: the tokens of the largest class.

    Raises:
        UserError: a class is empty, is not in [-1, C), or has more than num_ranks tokens.
    """
    vocab_size = len(class_of)
    if class_of.min() < -1 or class_of.max() >= num_classes:
        raise UserError(f"class_of: must be in [-1, {num_classes})")
    frequent, tokens = np.flatnonzero(class_of < 0), np.flatnonzero(class_of >= 0)
    sizes = np.bincount(class_of[tokens], minlength=num_classes)
    if not sizes.all():
        raise UserError(f"class_of: class {np.argmin(sizes)} has no token")
    num_ranks = num_ranks or int(sizes.max())
    if sizes.max() > num_ranks:
        raise UserError(f"num_ranks={num_ranks}: must be at least {sizes.max()}, the largest class")
    by_class = tokens[np.argsort(class_of[tokens], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank_of, entry_of = np.zeros(vocab_size, np.int32), np.zeros(vocab_size, np.int32)
    rank_of[by_class] = np.arange(len(tokens)) - starts[class_of[by_class]]
    entry_of[frequent] = np.arange(len(frequent))
    entry_of[tokens] = len(frequent) + class_of[tokens]
    members = np.full((num_classes, num_ranks), -1, np.int32)
    members[class_of[tokens], rank_of[tokens]] = tokens
    entries = np.append(frequent, vocab_size + np.arange(num_classes)).astype(np.int32)
    return Classes(*map(jnp.asarray, (entries, entry_of, members, rank_of)))


def nll(h: jax.Array, weights: Weights, classes: Classes, targets: jax.Array) -> jax.Array:
    """-log p(target | h), float32 (...), for h (..., D) and targets int (...) in [0, V)."""
    # Barriers keep XLA from computing these again for every element that is compared with them.
    entry, rank = jax.lax.optimization_barrier(
        (classes.entry_of[targets], classes.rank_of[targets])
    )
    class_ = entry - num_frequent(classes)
    nll_of_entry = _nll(entry_logits(h, entry_vectors(weights, classes), weights, classes), entry)
    z_xR = member_logits(h, weights, classes, jnp.maximum(class_, 0))
    nll_of_member = _nll(z_xR, rank)
    return nll_of_entry + jnp.where(class_ < 0, 0.0, nll_of_member)


def log_probs(h: jax.Array, weights: Weights, classes: Classes) -> jax.Array:
    """Log p of all V tokens, float32 (..., V). V M gathers per position."""
    entries = entry_logits(h, entry_vectors(weights, classes), weights, classes)
    log_p_entry = jax.nn.log_softmax(entries)
    vocab_size = len(classes.entry_of)
    scale, bias = (None if x is None else x[:vocab_size] for x in (weights.scale, weights.bias))
    table_MxK = _code_logits(h, weights.codebooks)
    z_xV = multi.logits(tuple(table_MxK), weights.codes[:vocab_size], bias, scale)
    z_xCxR = jnp.where(classes.members < 0, -jnp.inf, z_xV[..., classes.members])
    log_z_xC = jax.nn.logsumexp(z_xCxR, axis=-1)
    class_V = classes.entry_of - num_frequent(classes)
    log_p_member = jnp.where(class_V < 0, 0.0, z_xV - log_z_xC[..., jnp.maximum(class_V, 0)])
    return log_p_entry[..., classes.entry_of] + log_p_member


def entry_vectors(weights: Weights, classes: Classes) -> jax.Array:
    """Vectors of the first level, (F + C, D), for `entry_logits`: they depend on no position."""
    codebooks = tuple(weights.codebooks.astype(jnp.float32))
    vectors = multi.product_vectors(codebooks, weights.codes[classes.entries])
    if weights.scale is not None:
        vectors = vectors * weights.scale[classes.entries, None]
    return vectors.astype(weights.codebooks.dtype)


def entry_logits(h: jax.Array, vectors: jax.Array, weights: Weights, classes: Classes) -> jax.Array:
    """Logits of the first level, float32 (..., F + C), with its `entry_vectors`."""
    z = product(h, vectors)
    return z if weights.bias is None else z + weights.bias[classes.entries].astype(jnp.float32)


def member_logits(h: jax.Array, weights: Weights, classes: Classes, class_: jax.Array) -> jax.Array:
    """Logits within given classes; -inf where a class has no such rank.

    Args:
        class_: int (...), in [0, C).

    Returns:
        float32 (..., R).
    """
    members_xR = classes.members[class_]
    tokens_xR = jnp.maximum(members_xR, 0)
    # Codebooks in front, as the product of slices leaves them: no table is transposed.
    table_MxK = _code_logits(h, weights.codebooks)
    codes_MxxR = jax.lax.optimization_barrier(jnp.moveaxis(weights.codes[tokens_xR], -1, 0))
    z_xR = jnp.sum(jnp.take_along_axis(table_MxK, codes_MxxR, axis=-1), axis=0)
    if weights.scale is not None:
        z_xR = z_xR * weights.scale[tokens_xR]
    if weights.bias is not None:
        z_xR = z_xR + weights.bias[tokens_xR].astype(jnp.float32)
    return jnp.where(members_xR < 0, -jnp.inf, z_xR)


def _code_logits(h: jax.Array, codebooks: jax.Array) -> jax.Array:
    """Products of the slices of h with the codebooks, float32 (M, ..., K)."""
    h_xMxW = h.reshape(*h.shape[:-1], *codebooks.shape[::2])
    return jnp.einsum("...mw,mkw->m...k", h_xMxW, codebooks, preferred_element_type=jnp.float32)


def num_frequent(classes: Classes) -> int:
    """F."""
    return len(classes.entries) - len(classes.members)


def _nll(z: jax.Array, target: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(z, axis=-1) - multi.pick(z, target)
