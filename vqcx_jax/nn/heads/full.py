"""The ordinary output layer."""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.base import Head
from vqcx_jax.nn.layers import HIDDEN, ROWS, embed
from vqcx_jax.nn.variables import param
from vqcx_jax.ops import softmax
from vqcx_jax.ops.checks import check_positive, check_shape
from vqcx_jax.ops.soft_cap import check_cap
from vqcx_jax.sharding import LogicalAxes, constrain, mesh_axes, per_device

_Implementation = Literal["plain", "streamed"]


class FullHead(Head):
    """One vector per token: z = W h + b, the product optionally soft-capped.

    Its `weights` may be the table of an input embedding as well, see `Transformer`.

    Args:
        implementation: how the loss is computed: "plain" keeps the logits of all positions,
            "streamed" holds a block of them at a time: of positions for the loss of a batch (see
            `summed_nll`), of the vocabulary for losses of single tokens.
        weights: float32 (V, D) to start from, or None for random.

    Raises:
        UserError: sizes or a cap that are not positive, weights that are not (V, D), or an
            implementation that is none.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        token_bias: bool = False,
        logit_soft_cap: float | None = None,
        implementation: _Implementation = "plain",
        weights: jax.Array | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        check_positive(vocab_size=vocab_size, dim=dim)
        check_cap(logit_soft_cap, "logit_soft_cap")
        check_shape("weights", weights, (vocab_size, dim))
        if implementation not in get_args(_Implementation):
            accepted = get_args(_Implementation)
            raise UserError(f"implementation={implementation!r}: must be one of {accepted}")
        if weights is None:
            weights = 0.02 * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
        self.weights = param(weights, ("vocab", "embed"))
        if token_bias:
            self.bias = param(jnp.zeros((vocab_size,), jnp.float32), ("vocab",), decay=False)
        self.has_bias = token_bias
        self.vocab_size = vocab_size
        self.logit_soft_cap = logit_soft_cap
        self.implementation = implementation
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def _arrays(self) -> tuple[jax.Array, jax.Array | None]:
        weights = constrain(self.weights[...].astype(self.dtype), ("vocab", None), self.rules)
        return weights, self.bias[...] if self.has_bias else None

    def token_nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.token_nll`."""
        weights, bias = self._arrays()
        if self.implementation == "plain":
            return softmax.nll(h_BxTxD, weights, tokens_BxT, bias, cap=self.logit_soft_cap)
        vocab_axes = mesh_axes("vocab", self.rules)
        nll = partial(softmax.streamed_nll, cap=self.logit_soft_cap, vocab_axes=vocab_axes)
        axes: list[LogicalAxes] = [HIDDEN, ("vocab", None), ROWS, ("vocab",)]
        return per_device(nll, axes, (ROWS, ROWS), self.rules)(h_BxTxD, weights, tokens_BxT, bias)

    def summed_nll(
        self,
        h_BxTxD: jax.Array,
        targets_BxT: jax.Array,
        is_token_BxT: jax.Array,
        z_loss: float | jax.Array = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Head.summed_nll`. "streamed" makes gradients along with the loss, in one pass."""
        if self.implementation == "plain":
            return super().summed_nll(h_BxTxD, targets_BxT, is_token_BxT, z_loss)
        vocab_axes = mesh_axes("vocab", self.rules)

        def sums(
            h: jax.Array, tokens: jax.Array, counts: jax.Array, z_loss: jax.Array, *rows: Any
        ) -> tuple[jax.Array, jax.Array]:
            weights, bias = rows
            return softmax.summed_nll(
                h,
                weights,
                tokens,
                counts,
                bias,
                z_loss,
                cap=self.logit_soft_cap,
                vocab_axes=vocab_axes,
            )

        axes = [("vocab", None), ("vocab",)]
        labelled = (h_BxTxD, targets_BxT, is_token_BxT)
        return self._over_devices(sums, *labelled, z_loss, self._arrays(), axes)

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`."""
        return softmax.logits(h_BxTxD, *self._arrays(), cap=self.logit_soft_cap)

    def embed(self, tokens_BxT: jax.Array) -> jax.Array:
        """The vectors of the tokens, (B, T, D): an input embedding tied to the output layer."""
        return embed(self.weights[...].astype(self.dtype), tokens_BxT, self.rules)
