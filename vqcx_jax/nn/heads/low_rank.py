"""The ordinary output layer with weights of low rank."""

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.heads.base import Head
from vqcx_jax.nn.layers import fan_in_normal
from vqcx_jax.nn.variables import param
from vqcx_jax.ops.checks import check_positive
from vqcx_jax.ops.soft_cap import check_cap
from vqcx_jax.ops.softmax import low_rank
from vqcx_jax.sharding import constrain


class LowRankHead(Head):
    """z = U (A h) + b with A of `rank` rows, the product optionally soft-capped.

    Raises:
        UserError: sizes or a cap that are not positive.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        rank: int,
        *,
        token_bias: bool = False,
        logit_soft_cap: float | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(vocab_size=vocab_size, dim=dim, rank=rank)
        check_cap(logit_soft_cap, "logit_soft_cap")
        # A keeps the size of h, so that U starts as the weights of a full head do.
        self.down = param(fan_in_normal(rngs.params(), (rank, dim), dim), (None, "embed"))
        up = 0.02 * jax.random.normal(rngs.params(), (vocab_size, rank), jnp.float32)
        self.up = param(up, ("vocab", "embed"))
        if token_bias:
            self.bias = param(jnp.zeros((vocab_size,), jnp.float32), ("vocab",), decay=False)
        self.has_bias = token_bias
        self.vocab_size = vocab_size
        self.logit_soft_cap = logit_soft_cap
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def _arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        down = constrain(self.down[...].astype(self.dtype), (None, None), self.rules)
        up = constrain(self.up[...].astype(self.dtype), ("vocab", None), self.rules)
        return down, up, self.bias[...] if self.has_bias else None

    def token_nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.token_nll`."""
        down, up, bias = self._arrays()
        return low_rank.nll(h_BxTxD, down, up, tokens_BxT, bias, cap=self.logit_soft_cap)

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`."""
        return low_rank.logits(h_BxTxD, *self._arrays(), cap=self.logit_soft_cap)
