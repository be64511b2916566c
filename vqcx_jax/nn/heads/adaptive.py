"""Adaptive softmax as an output layer."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.normalized import NormalizedHead, check_ranks, whole
from vqcx_jax.nn.layers import fan_in_normal
from vqcx_jax.nn.variables import Param, buffer, param
from vqcx_jax.ops.checks import check_positive
from vqcx_jax.ops.softmax import adaptive
from vqcx_jax.ops.softmax.adaptive import AdaptiveWeights, Cluster


class _Arrays(NamedTuple):
    weights: AdaptiveWeights
    frequency_rank: jax.Array


class ClusterWeights(nnx.Module):
    """The two matrices of a cluster, see `ops.softmax.adaptive`."""

    def __init__(self, size: int, width: int, dim: int, *, rngs: nnx.Rngs):
        self.down = param(fan_in_normal(rngs.params(), (width, dim), dim), (None, "embed"))
        up = 0.02 * jax.random.normal(rngs.params(), (size, width), jnp.float32)
        self.up: Param = param(up, (None, None))


class AdaptiveHead(NormalizedHead):
    """Adaptive softmax (Grave et al. 2017), the function of PyTorch's AdaptiveLogSoftmaxWithLoss.

    Args:
        cutoffs: rising ranks in [1, V) at which clusters begin.
        div_value: vectors of cluster i have width dim / div_value^(i + 1), rounded down.
        head_bias: a bias for frequent tokens and clusters.
        frequency_rank: int (V,), each token's rank, 0 the most frequent; None: tokens are in order.

    Raises:
        UserError: sizes that are not positive; cutoffs, div_value or ranks that do not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        cutoffs: Sequence[int],
        *,
        div_value: float = 4.0,
        head_bias: bool = False,
        frequency_rank: np.ndarray | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(vocab_size=vocab_size, dim=dim)
        bounds = [0, *cutoffs, vocab_size]
        if len(bounds) < 3 or sorted(set(bounds)) != bounds:
            raise UserError(f"cutoffs={tuple(cutoffs)}: must rise within 1 .. {vocab_size - 1}")
        if not 1 <= div_value < math.inf:
            raise UserError(f"div_value={div_value}: must be at least 1, and finite")
        shapes = adaptive.cluster_shapes(vocab_size, dim, cutoffs, div_value)
        if shapes[-1][1] < 1:
            raise UserError(
                f"div_value={div_value}: leaves the last of {len(shapes)} clusters none of {dim} "
                "dimensions"
            )
        rows = cutoffs[0] + len(cutoffs)
        head = 0.02 * jax.random.normal(rngs.params(), (rows, dim), jnp.float32)
        self.head = param(head, (None, "embed"))
        if head_bias:
            self.bias = param(jnp.zeros((rows,), jnp.float32), (None,), decay=False)
        self.clusters = nnx.Dict(
            {
                str(i): ClusterWeights(size, width, dim, rngs=rngs)
                for i, (size, width) in enumerate(shapes)
            }
        )
        self.frequency_rank = buffer(check_ranks(frequency_rank, vocab_size), (None,))
        self.has_bias = head_bias
        self.num_clusters = len(shapes)
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def _arrays(self) -> _Arrays:
        clusters = [self.clusters[str(i)] for i in range(self.num_clusters)]
        weights = AdaptiveWeights(
            whole(self.head, self.rules, self.dtype),
            self.bias[...] if self.has_bias else None,
            tuple(
                Cluster(whole(c.down, self.rules, self.dtype), whole(c.up, self.rules, self.dtype))
                for c in clusters
            ),
        )
        return _Arrays(weights, self.frequency_rank[...])

    def _nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array, arrays: _Arrays) -> jax.Array:
        return adaptive.nll(h_BxTxD, arrays.weights, arrays.frequency_rank[tokens_BxT])

    def _log_probs(self, h_BxTxD: jax.Array, arrays: _Arrays) -> jax.Array:
        return adaptive.log_probs(h_BxTxD, arrays.weights)[..., arrays.frequency_rank]
