"""What every output layer offers: hidden states in, losses, logits or tokens out."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.config.schema.types import HeadImplementation
from vqcx_jax.errors import UserError
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.ops import sampling
from vqcx_jax.ops.checks import check_shape
from vqcx_jax.ops.codebook.reassign import Statistics
from vqcx_jax.ops.labels import check_labels
from vqcx_jax.sharding import (
    LogicalAxes,
    by_compiler,
    constrain,
    cuts_tokens_explicitly,
    per_device,
    token_mesh_axes,
)

# (hidden states (B, T, D), PRNG key) -> token ids int32 (B, T).
Sampler = Callable[[jax.Array, jax.Array], jax.Array]
_Sums = Callable[..., tuple[jax.Array, jax.Array]]


def named(implementation: HeadImplementation) -> str | None:
    """What operations are given as their `implementation`.

    Raises:
        UserError: neither "auto" nor "xla".
    """
    accepted = get_args(HeadImplementation)
    if implementation not in accepted:
        raise UserError(f"implementation={implementation!r}: must be one of {accepted}")
    return None if implementation == "auto" else implementation


class Head(nnx.Module, abc.ABC):
    """An output layer. It is given hidden states, never logits.

    A head must say its `vocab_size` and `rules`, compute `token_nll` and `logits`, and replaces
    `top_k` and `token_sampler` where it can do without V logits, and `summed_nll` where a sum is
    cheaper than its terms.

    An optional `logit_soft_cap` bounds the part of a logit that depends on the hidden state, see
    `ops.soft_cap`; everything below is then of the capped logits.
    """

    vocab_size: int
    rules: ShardingRules

    @abc.abstractmethod
    def token_nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`nll` of tokens that are all in [0, V)."""

    @abc.abstractmethod
    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """Float32 (B, T, V): log-probabilities up to a constant of each position."""

    def nll(self, h_BxTxD: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-log p(target | h) and log Z, float32 (B, T); both 0 where the target is IGNORE_ID.

        Raises:
            UserError: a target is neither in [0, V) nor IGNORE_ID; under jit see
                `ops.labels.check_labels`. Targets are not one for each hidden state.
        """
        check_shape("targets", targets_BxT, h_BxTxD.shape[:-1])
        labels = check_labels(constrain(targets_BxT, ROWS, self.rules), self.vocab_size)
        nll_BxT, log_z_BxT = self.token_nll(h_BxTxD, labels.tokens)
        return labels.mask(nll_BxT), labels.mask(log_z_BxT)

    def summed_nll(
        self,
        h_BxTxD: jax.Array,
        targets_BxT: jax.Array,
        is_token_BxT: jax.Array,
        z_loss: float | jax.Array = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """Sum of nll + z_loss log(Z)^2, and of nll, over the tokens of a batch: a training loss.

        Args:
            targets_BxT: as in `nll`; those of IGNORE_ID do not count.
            is_token_BxT: bool, which positions count, such as those that are no padding.
            z_loss: coefficient of log(Z)^2.

        Returns:
            loss, nll: float32 (). nll is there to be reported; its gradient is zero.

        Raises:
            UserError: as `nll`.
        """
        _check_mask(is_token_BxT, h_BxTxD)
        nll_BxT, log_z_BxT = self.nll(h_BxTxD, targets_BxT)
        nll = jnp.sum(jnp.where(is_token_BxT, nll_BxT, 0.0))
        z_term = z_loss * jnp.sum(jnp.where(is_token_BxT, log_z_BxT**2, 0.0))
        return nll + z_term, jax.lax.stop_gradient(nll)

    def log_probs(self, h_BxTxD: jax.Array, tokens_BxTxC: jax.Array) -> jax.Array:
        """Log p of C given tokens at each position, float32 (B, T, C). Tokens as in `nll`."""
        if h_BxTxD.ndim != 3:
            raise UserError(f"h has shape {h_BxTxD.shape}; it must be (B, T, D)")
        num_tokens = tokens_BxTxC.shape[-1]
        check_shape("tokens", tokens_BxTxC, (*h_BxTxD.shape[:-1], num_tokens))
        if num_tokens == 0:
            return jnp.zeros(tokens_BxTxC.shape)

        def listed(h: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.repeat(h, num_tokens, axis=1), tokens.reshape(len(tokens), -1)

        def by_position(nll: jax.Array) -> tuple[jax.Array]:
            return (nll.reshape(len(nll), nll.shape[1] // num_tokens, num_tokens),)

        # On each device, as a sequence that is cut keeps its cuts.
        rows = per_device(listed, [HIDDEN, HIDDEN], (HIDDEN, ROWS), self.rules)
        nll_BxTC = self.nll(*rows(h_BxTxD, constrain(tokens_BxTxC, HIDDEN, self.rules)))[0]
        return -per_device(by_position, [ROWS], (HIDDEN,), self.rules)(nll_BxTC)[0]

    def top_k(self, h_BxTxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k most probable tokens, in order; of equals, the lowest id first.

        Returns:
            log_probs: float32 (B, T, k). tokens: int32 (B, T, k).

        Raises:
            UserError: k is not in 1 .. V.
        """
        return sampling.top_k(self._whole_logits(h_BxTxD), k)

    def sample(
        self,
        h_BxTxD: jax.Array,
        key: jax.Array,
        *,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | jax.Array | None = None,
    ) -> jax.Array:
        """Tokens drawn from the model, int32 (B, T): temperature, then top-k, then top-p.

        Args:
            key: a typed PRNG key.
            temperature, top_k, top_p: see `ops.sampling.sample`.

        Raises:
            UserError: top_k is not positive.
        """
        return self.sampler(temperature=temperature, top_k=top_k, top_p=top_p)(h_BxTxD, key)

    def sampler(
        self,
        *,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | jax.Array | None = None,
    ) -> Sampler:
        """`sample` as a function of h and key, for loops: what depends on neither is done here.

        On a mesh of Explicit axes it is done in each call, unless the rules leave `batch` and
        `sequence` whole.
        """
        if not cuts_tokens_explicitly(self.rules):
            return self.token_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        sampling.check_temperature(temperature)
        sampling.check_top_p(top_p)
        graphdef, state = nnx.split(self)

        def sample(
            state: nnx.State, h_BxTxD: jax.Array, key: jax.Array, how: dict[str, Any]
        ) -> jax.Array:
            return nnx.merge(graphdef, state).token_sampler(top_k=top_k, **how)(h_BxTxD, key)

        draw = by_compiler(sample, ROWS, self.rules)
        how = {"temperature": temperature, "top_p": top_p}
        return lambda h_BxTxD, key: draw(state, h_BxTxD, key, how)

    def token_sampler(
        self,
        *,
        temperature: float | jax.Array,
        top_k: int | None,
        top_p: float | jax.Array | None,
    ) -> Sampler:
        """`sampler`, where no axis of the mesh that cuts tokens is Explicit."""

        def sample(h_BxTxD: jax.Array, key: jax.Array) -> jax.Array:
            logits_BxTxV = self._whole_logits(h_BxTxD)
            return sampling.sample(
                logits_BxTxV, key, temperature=temperature, top_k=top_k, top_p=top_p
            )

        return sample

    def statistics(self) -> Statistics | None:
        """What the head remembers of the hidden states it was trained with; None: nothing.

        For heads that learn from them in other ways than by gradients. The trainer sums `observe`
        over the batches of a step and hands it to `adapt` when the weights are updated.
        """
        return None

    def observe(
        self, h_BxTxD: jax.Array, targets_BxT: jax.Array, is_token_BxT: jax.Array
    ) -> Statistics | None:
        """What `statistics` would be of this batch alone (all of it, on a mesh)."""
        return None

    def adapt(self, observed: Statistics | None, step: jax.Array) -> None:
        """Updates the head's buffers in place.

        Args:
            observed: sum of `observe` over the batches of the step.
            step: int32 (), steps done with this one.
        """

    def _over_devices(
        self,
        sums: _Sums,
        h_BxTxD: jax.Array,
        targets_BxT: jax.Array,
        is_token_BxT: jax.Array,
        z_loss: float | jax.Array,
        arrays: Sequence[Any],
        axes: Sequence[LogicalAxes],
    ) -> tuple[jax.Array, jax.Array]:
        """`summed_nll` by a function of what one device has.

        Args:
            sums: (h, tokens in [0, V), which of them count, z_loss, *arrays) -> loss, nll.
            arrays: weights and buffers, laid out along `axes`.
        """
        check_shape("targets", targets_BxT, h_BxTxD.shape[:-1])
        _check_mask(is_token_BxT, h_BxTxD)
        labels = check_labels(constrain(targets_BxT, ROWS, self.rules), self.vocab_size)
        is_token_BxT = constrain(is_token_BxT, ROWS, self.rules)
        counts_BxT = is_token_BxT & ~labels.is_ignored & ~labels.is_invalid
        token_axes = token_mesh_axes(self.rules)
        loss, nll = per_device(
            lambda *args: jax.lax.psum(sums(*args), token_axes),
            [HIDDEN, ROWS, ROWS, (), *axes],
            ((), ()),
            self.rules,
        )(h_BxTxD, labels.tokens, counts_BxT, jnp.asarray(z_loss, jnp.float32), *arrays)
        invalid = jnp.where(jnp.any(is_token_BxT & labels.is_invalid), jnp.nan, 0.0)
        return loss + invalid, nll + invalid

    def _whole_logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """Logits of which every device has the whole vocabulary, which sorting needs."""
        return constrain(self.logits(h_BxTxD), HIDDEN, self.rules)


def _check_mask(is_token: jax.Array, h: jax.Array) -> None:
    check_shape("is_token", is_token, h.shape[:-1])
    if is_token.dtype != bool:
        raise UserError(
            f"is_token has dtype {is_token.dtype}; it must be bool (weighted sums: multiply nll)"
        )
