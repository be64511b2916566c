"""Adaptive softmax (Grave et al. 2017): rare tokens in clusters, with vectors of falling width.

Tokens are given by their rank, 0 the most frequent. The first `cutoffs[0]` ranks and the n
clusters make one softmax, the head; ranks cutoffs[i] .. cutoffs[i + 1] - 1 make cluster i, a
softmax over vectors of width D / div_value^(i + 1). A token of a cluster has the probability of the
cluster times its own in it, so that all V add up to one. The same function as PyTorch's
`AdaptiveLogSoftmaxWithLoss`.

Every cluster is computed at every position, though only the target's is needed, because XLA
compiles no shapes that follow the data. A position so takes cutoffs[0] D + sum_i size_i width_i
multiplications in place of V D.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.ops.checks import check_targets
from vqcx_jax.ops.product import product
from vqcx_jax.ops.softmax import low_rank
from vqcx_jax.ops.softmax.full import logits
from vqcx_jax.ops.softmax.streamed import nll as streamed_nll
from vqcx_jax.ops.varying import varying_like


class Cluster(NamedTuple):
    """Weights of one cluster.

    Attributes:
        down: (W, D). up: (size, W).
    """

    down: jax.Array
    up: jax.Array


class AdaptiveWeights(NamedTuple):
    """All weights of an adaptive softmax, of one dtype.

    Attributes:
        head: (cutoffs[0] + n, D), clusters last. bias: float32 (cutoffs[0] + n,) or None.
        clusters: n of them, by falling frequency.
    """

    head: jax.Array
    bias: jax.Array | None
    clusters: tuple[Cluster, ...]


def cluster_shapes(
    vocab_size: int, dim: int, cutoffs: Sequence[int], div_value: float
) -> list[tuple[int, int]]:
    """Tokens and width of each cluster."""
    ends = [*cutoffs[1:], vocab_size]
    return [
        (end - start, int(dim // div_value ** (i + 1)))
        for i, (start, end) in enumerate(zip(cutoffs, ends, strict=True))
    ]


def nll(h: jax.Array, weights: AdaptiveWeights, ranks: jax.Array) -> jax.Array:
    """-log p(rank | h), without V logits: every softmax is streamed.

    Args:
        h: (..., D). ranks: int (...), values in [0, V).

    Returns:
        float32 (...).

    Raises:
        UserError: ranks are not one for each h; where they are known, ranks out of range (under jit
            their nll is NaN).
    """
    shortlist = weights.head.shape[0] - len(weights.clusters)
    starts = [shortlist]
    for cluster in weights.clusters:
        starts.append(starts[-1] + cluster.up.shape[0])
    check_targets(ranks, starts[-1], h.shape[:-1], "ranks")
    # A rank of no cluster that is no row of the head either has the loss NaN, by that of its row.
    row, tail = ranks, jnp.zeros_like(h[..., 0], jnp.float32)
    for i, cluster in enumerate(weights.clusters):
        start, size = starts[i], cluster.up.shape[0]
        is_inside = (ranks >= start) & (ranks < start + size)
        row = jnp.where(is_inside, shortlist + i, row)
        narrow = product(h, varying_like(cluster.down, h)).astype(h.dtype)
        inside, _ = streamed_nll(narrow, cluster.up, jnp.clip(ranks - start, 0, size - 1))
        tail = tail + jnp.where(is_inside, inside, 0.0)
    return streamed_nll(h, weights.head, row, weights.bias)[0] + tail


def log_probs(h: jax.Array, weights: AdaptiveWeights) -> jax.Array:
    """Log p of every token, by rank.

    Args:
        h: (..., D).

    Returns:
        float32 (..., V).
    """
    head = jax.nn.log_softmax(logits(h, weights.head, weights.bias), axis=-1)
    shortlist = weights.head.shape[0] - len(weights.clusters)
    parts = [head[..., :shortlist]]
    for i, (down, up) in enumerate(weights.clusters):
        inside = jax.nn.log_softmax(low_rank.logits(h, down, up), axis=-1)
        parts.append(head[..., shortlist + i, None] + inside)
    return jnp.concatenate(parts, axis=-1)
