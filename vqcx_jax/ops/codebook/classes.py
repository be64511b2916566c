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

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vqcx_jax.ops.checks import check_targets
from vqcx_jax.ops.codebook import members, multi, scatter
from vqcx_jax.ops.codebook.class_arrays import (
    Classes,
    Codes,
    Weights,
    arrange,
    arrange_codes,
    num_frequent,
)
from vqcx_jax.ops.codebook.members.xla import code_logits
from vqcx_jax.ops.codebook.members.xla import logits as member_logits
from vqcx_jax.ops.labels import nan_if_counted, nan_unless_tokens
from vqcx_jax.ops.product import product
from vqcx_jax.ops.softmax import resident

__all__ = [
    "Classes",
    "Codes",
    "Weights",
    "arrange",
    "arrange_codes",
    "entry_logits",
    "entry_vectors",
    "log_probs",
    "member_logits",
    "nll",
    "num_frequent",
    "summed_nll",
    "token_vectors",
]


def nll(
    h: jax.Array,
    weights: Weights,
    classes: Classes,
    targets: jax.Array,
    *,
    implementation: str | None = None,
    product_dtype: DTypeLike = "float32",
) -> jax.Array:
    """-log p(target | h), float32 (...), for h (..., D) and targets int (...) in [0, V).

    Raises UserError where targets are not one for each h, or are known and not in [0, V): -100 is
    for heads. Under jit nll of such targets is NaN.

    `implementation` and `product_dtype` are of the second level, see `members.nll`.
    """
    entry, class_, rank = _places(h, classes, targets)
    nll_of_entry = _nll(entry_logits(h, entry_vectors(weights, classes), weights, classes), entry)
    nll_of_member = members.nll(
        h,
        weights,
        classes,
        class_,
        rank,
        implementation=implementation,
        product_dtype=product_dtype,
    )
    return nan_unless_tokens(nll_of_entry + nll_of_member, targets, len(classes.entry_of))


def summed_nll(
    h: jax.Array,
    weights: Weights,
    classes: Classes,
    targets: jax.Array,
    counts: jax.Array,
    *,
    implementation: str | None = None,
    product_dtype: DTypeLike = "float32",
) -> jax.Array:
    """Sum of `nll` over the positions that count, bool (...): float32 ().

    `implementation` is of both levels, see `softmax.resident` for the first one. Under `shard_map`
    the sum is of each device's own positions.
    """
    entry, class_, rank = _places(h, classes, targets)
    nll_of_entries, _ = resident.summed_nll(
        h,
        entry_vectors(weights, classes),
        entry,
        counts,
        None if weights.bias is None else weights.bias[classes.entries],
        implementation=implementation,
    )
    nll_of_members = members.nll(
        h,
        weights,
        classes,
        jnp.where(counts, class_, -1),
        rank,
        implementation=implementation,
        product_dtype=product_dtype,
    )
    invalid = nan_if_counted(targets, counts, len(classes.entry_of))
    return nll_of_entries + jnp.sum(nll_of_members) + invalid


def _places(
    h: jax.Array, classes: Classes, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Entry, class (negative: none) and rank of tokens."""
    check_targets(targets, len(classes.entry_of), h.shape[:-1])
    # Barriers keep XLA from computing these again for every element that is compared with them.
    entry, rank = jax.lax.optimization_barrier(
        (classes.entry_of[targets], classes.rank_of[targets])
    )
    return entry, entry - num_frequent(classes), rank


def log_probs(
    h: jax.Array, weights: Weights, classes: Classes, *, implementation: str | None = None
) -> jax.Array:
    """Log p of all V tokens, float32 (..., V). V M gathers per position, see `scatter.logits`."""
    entries = entry_logits(h, entry_vectors(weights, classes), weights, classes)
    log_p_entry = jax.nn.log_softmax(entries)
    vocab_size = len(classes.entry_of)
    scale, bias = (None if x is None else x[:vocab_size] for x in (weights.scale, weights.bias))
    table_MxK = code_logits(h, weights.codebooks)
    codes_VxM = weights.codes.of_nodes[:vocab_size].astype(jnp.int32)
    z_xV = scatter.logits(tuple(table_MxK), codes_VxM, bias, scale, implementation=implementation)
    z_xCxR = jnp.where(classes.members < 0, -jnp.inf, z_xV[..., classes.members])
    log_z_xC = jax.nn.logsumexp(z_xCxR, axis=-1)
    class_V = classes.entry_of - num_frequent(classes)
    log_p_member = jnp.where(class_V < 0, 0.0, z_xV - log_z_xC[..., jnp.maximum(class_V, 0)])
    return log_p_entry[..., classes.entry_of] + log_p_member


def entry_vectors(weights: Weights, classes: Classes) -> jax.Array:
    """Vectors of the first level, (F + C, D), for `entry_logits`: they depend on no position."""
    return _vectors(weights, weights.codes.of_entries, classes.entries)


def token_vectors(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Vectors of tokens, int (...) in [0, V): (..., D), for an embedding of the same codes."""
    return _vectors(weights, weights.codes.of_nodes[tokens], tokens)


def _vectors(weights: Weights, codes: jax.Array, nodes: jax.Array) -> jax.Array:
    codebooks = tuple(weights.codebooks.astype(jnp.float32))
    vectors = multi.product_vectors(codebooks, codes.astype(jnp.int32))
    if weights.scale is not None:
        vectors = vectors * weights.scale[nodes][..., None]
    return vectors.astype(weights.codebooks.dtype)


def entry_logits(h: jax.Array, vectors: jax.Array, weights: Weights, classes: Classes) -> jax.Array:
    """Logits of the first level, float32 (..., F + C), with its `entry_vectors`."""
    z = product(h, vectors)
    return z if weights.bias is None else z + weights.bias[classes.entries].astype(jnp.float32)


def _nll(z: jax.Array, target: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(z, axis=-1) - multi.pick(z, target)
