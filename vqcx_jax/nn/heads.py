"""Output layers behind one interface: hidden states in, losses or logits out."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops import codebook, softmax
from vqcx_jax.sharding import LogicalAxes, constrain, per_device


class Head(Protocol):
    """What every output layer offers. It is given hidden states, never logits."""

    def nll(self, h_BxTxD: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-log p(target | h) and log Z, float32 (B, T)."""
        ...

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """Float32 (B, T, V)."""
        ...


class FullHead(nnx.Module):
    """One vector per token: z = W h + b."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        token_bias: bool = False,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        weights = 0.02 * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
        self.weights = param(weights, ("vocab", "embed"))
        if token_bias:
            self.bias = param(jnp.zeros((vocab_size,), jnp.float32), ("vocab",), decay=False)
        self.has_bias = token_bias
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def _arrays(self) -> tuple[jax.Array, jax.Array | None]:
        weights = constrain(self.weights[...].astype(self.dtype), ("vocab", None), self.rules)
        return weights, self.bias[...] if self.has_bias else None

    def nll(self, h_BxTxD: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.nll`."""
        weights, bias = self._arrays()
        targets_BxT = constrain(targets_BxT, ROWS, self.rules)
        return softmax.nll(h_BxTxD, weights, targets_BxT, bias)

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`."""
        weights, bias = self._arrays()
        return softmax.logits(h_BxTxD, weights, bias)


class VQHead(nnx.Module):
    """VQ-Logits: token v has the logit codes[assignment[v]] . h + bias[v].

    Args:
        assignment: int (V,), values in [0, num_codes); see `vqcx_jax.assignment`.
        codes: float32 (num_codes, dim) to start from, or None for random.
    """

    def __init__(
        self,
        assignment: jax.Array,
        num_codes: int,
        dim: int,
        *,
        token_bias: bool = True,
        codes: jax.Array | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        if codes is None:
            codes = 0.02 * jax.random.normal(rngs.params(), (num_codes, dim), jnp.float32)
        self.codes = param(codes, ("codes", "embed"))
        self.assignment = buffer(jnp.asarray(assignment, jnp.int32), (None,))
        if token_bias:
            zeros = jnp.zeros(assignment.shape, jnp.float32)
            self.bias = param(zeros, (None,), decay=False)
        self.has_bias = token_bias
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def _arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        codes = constrain(self.codes[...].astype(self.dtype), (None, None), self.rules)
        return codes, self.assignment[...], self.bias[...] if self.has_bias else None

    def nll(self, h_BxTxD: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.nll`. O(K) per position: no array of V columns is made."""
        codes, assignment, bias = self._arrays()
        args = [h_BxTxD, codes, assignment, constrain(targets_BxT, ROWS, self.rules)]
        axes: list[LogicalAxes] = [HIDDEN, (None, None), (None,), ROWS]
        if bias is not None:
            args.append(bias)
            axes.append((None,))
        return per_device(codebook.nll, axes, (ROWS, ROWS), self.rules)(*args)

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`."""
        codes, assignment, bias = self._arrays()
        return codebook.logits(h_BxTxD, codes, assignment, bias)
