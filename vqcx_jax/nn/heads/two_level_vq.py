"""VQ-Logits in two levels: the code, then the rank within it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.heads.base import Sampler
from vqcx_jax.nn.heads.normalized import NormalizedHead, whole
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops import sampling
from vqcx_jax.ops.codebook import two_level


class TwoLevelVQHead(NormalizedHead):
    """p(token | h) = p(code | h) p(rank | code, h), see `ops.codebook.two_level`.

    O(K + R) per position; V logits are as much work as a full softmax.

    Args:
        levels: code and rank of every token, from `ops.codebook.two_level.levels`; every code has
            a token.
        codes: float32 (K, D) to start from, or None for random.
    """

    def __init__(
        self,
        levels: two_level.Levels,
        dim: int,
        *,
        token_bias: bool = True,
        codes: jax.Array | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        num_codes, num_ranks = levels.tokens.shape
        vocab_size = len(levels.codes)
        if codes is None:
            codes = 0.02 * jax.random.normal(rngs.params(), (num_codes, dim), jnp.float32)
        self.codes = param(codes, ("codes", "embed"))
        self.gates = param(jnp.ones((num_codes, dim), jnp.float32), ("codes", "embed"), decay=False)
        ranks = 0.02 * jax.random.normal(rngs.params(), (num_ranks, dim), jnp.float32)
        self.ranks = param(ranks, (None, "embed"))
        self.code_bias = param(jnp.zeros((num_codes,), jnp.float32), (None,), decay=False)
        if token_bias:
            self.bias = param(jnp.zeros((vocab_size,), jnp.float32), (None,), decay=False)
        self.code_of = buffer(levels.codes, (None,))
        self.rank_of = buffer(levels.ranks, (None,))
        self.tokens = buffer(levels.tokens, (None, None))
        self.has_bias = token_bias
        self.vocab_size = vocab_size
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def sampler(
        self,
        *,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | jax.Array | None = None,
    ) -> Sampler:
        """See `Head.sampler`. O(K + R) per position at temperature 1 without top-k and top-p.

        A product of two tempered softmaxes is not the tempered softmax of the product: everything
        else goes by V logits.
        """
        is_plain = isinstance(temperature, float | int) and temperature == 1
        if not is_plain or top_k is not None or top_p is not None:
            return super().sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        weights, levels = self._arrays()

        def sample(h_BxTxD: jax.Array, key: jax.Array) -> jax.Array:
            code_key, rank_key = jax.random.split(key)
            code = sampling.sample(two_level.code_logits(h_BxTxD, weights), code_key)
            rank_logits = two_level.rank_logits(h_BxTxD, weights, levels, code)
            return levels.tokens[code, sampling.sample(rank_logits, rank_key)]

        return sample

    def _arrays(self) -> tuple[two_level.Weights, two_level.Levels]:
        codes, gates, ranks = (
            whole(x, self.rules, self.dtype) for x in (self.codes, self.gates, self.ranks)
        )
        bias = self.bias[...] if self.has_bias else None
        weights = two_level.Weights(codes, gates, ranks, self.code_bias[...], bias)
        return weights, two_level.Levels(self.code_of[...], self.rank_of[...], self.tokens[...])

    def _nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array, arrays: Any) -> jax.Array:
        weights, levels = arrays
        return two_level.nll(h_BxTxD, weights, levels, tokens_BxT)

    def _log_probs(self, h_BxTxD: jax.Array, arrays: Any) -> jax.Array:
        return two_level.log_probs(h_BxTxD, *arrays)
