"""Two-level hierarchical softmax as an output layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.heads.normalized import NormalizedHead, check_ranks, whole
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops.checks import check_positive
from vqcx_jax.ops.hierarchical import TwoLevelWeights, class_size, two_level


class _Arrays(NamedTuple):
    weights: TwoLevelWeights
    frequency_rank: jax.Array


class TwoLevelHead(NormalizedHead):
    """p(class | h) p(token | class, h) with classes of ceil(sqrt V) tokens of like frequency.

    Args:
        bias: one for each class and each token.
        frequency_rank: int (V,), each token's rank, 0 the most frequent; None: tokens are in order.

    Raises:
        UserError: sizes that are not positive, or a frequency_rank that is no permutation of
            0 .. V - 1.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        bias: bool = True,
        frequency_rank: np.ndarray | None = None,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(vocab_size=vocab_size, dim=dim)
        size = class_size(vocab_size)
        num_classes = -(-vocab_size // size)

        def rows(*shape: int) -> jax.Array:
            return 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)

        self.classes = param(rows(num_classes, dim), (None, "embed"))
        self.tokens = param(rows(num_classes, size, dim), (None, None, "embed"))
        if bias:
            zeros = jnp.zeros((num_classes, size), jnp.float32)
            self.class_bias = param(zeros[:, 0], (None,), decay=False)
            self.token_bias = param(zeros, (None, None), decay=False)
        self.frequency_rank = buffer(check_ranks(frequency_rank, vocab_size), (None,))
        self.has_bias = bias
        self.vocab_size = vocab_size
        self.rules = rules or ShardingRules()

    def _arrays(self) -> _Arrays:
        weights = TwoLevelWeights(
            whole(self.classes, self.rules),
            whole(self.tokens, self.rules),
            self.class_bias[...] if self.has_bias else None,
            self.token_bias[...] if self.has_bias else None,
        )
        return _Arrays(weights, self.frequency_rank[...])

    def _nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array, arrays: _Arrays) -> jax.Array:
        ranks_BxT = arrays.frequency_rank[tokens_BxT]
        return two_level.nll(h_BxTxD, arrays.weights, ranks_BxT, self.vocab_size)

    def _log_probs(self, h_BxTxD: jax.Array, arrays: _Arrays) -> jax.Array:
        by_rank = two_level.log_probs(h_BxTxD, arrays.weights, self.vocab_size)
        return by_rank[..., arrays.frequency_rank]
