"""What output layers have in common whose probabilities add up to one without a V-term sum."""

import abc
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.base import Head
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import Param
from vqcx_jax.sharding import constrain, per_device


class NormalizedHead(Head):
    """An output layer whose logits are log-probabilities, so that log Z is 0 by construction.

    Every device computes the positions it has with all of the weights. A `z_loss` adds nothing.
    """

    @abc.abstractmethod
    def _arrays(self) -> Any:
        """Weights and buffers, whole on every device, as a pytree for the two below."""

    @abc.abstractmethod
    def _nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array, arrays: Any) -> jax.Array:
        """-log p of tokens in [0, V), on one device."""

    @abc.abstractmethod
    def _log_probs(self, h_BxTxD: jax.Array, arrays: Any) -> jax.Array:
        """Log p of all tokens by id, on one device."""

    def token_nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.token_nll`. The second result, log Z, is 0."""
        run = per_device(lambda *x: (self._nll(*x),), [HIDDEN, ROWS, ()], (ROWS,), self.rules)
        (nll_BxT,) = run(h_BxTxD, tokens_BxT, self._arrays())
        return nll_BxT, jnp.zeros_like(nll_BxT)

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`: log-probabilities."""
        run = per_device(lambda *x: (self._log_probs(*x),), [HIDDEN, ()], (HIDDEN,), self.rules)
        return run(h_BxTxD, self._arrays())[0]


def whole(weight: Param, rules: ShardingRules, dtype: Any = jnp.float32) -> jax.Array:
    """All of a weight on every device."""
    x = weight[...].astype(dtype)
    return constrain(x, (None,) * x.ndim, rules)


def check_ranks(frequency_rank: Iterable[int] | None, vocab_size: int) -> jax.Array:
    """Ranks as int32 (V,); None: tokens are in order of frequency.

    Raises:
        UserError: not a permutation of 0 .. V - 1.
    """
    if frequency_rank is None:
        return jnp.arange(vocab_size, dtype=jnp.int32)
    ranks = np.asarray(frequency_rank)
    if ranks.shape != (vocab_size,) or not np.array_equal(np.sort(ranks), np.arange(vocab_size)):
        raise UserError(
            f"frequency_rank of shape {ranks.shape}: must hold each of 0 .. {vocab_size - 1} once"
        )
    return jnp.asarray(ranks, jnp.int32)
