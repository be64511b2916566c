"""Output layers behind one interface: hidden states in, losses, logits or tokens out."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops import codebook, sampling, soft_cap, softmax
from vqcx_jax.ops.codebook import sampling as codebook_sampling
from vqcx_jax.sharding import LogicalAxes, constrain, per_device

# (hidden states (B, T, D), PRNG key) -> token ids int32 (B, T).
Sampler = Callable[[jax.Array, jax.Array], jax.Array]


class Head(Protocol):
    """What every output layer offers. It is given hidden states, never logits.

    An optional `logit_soft_cap` bounds the part of a logit that depends on the hidden state, see
    `ops.soft_cap`; everything below is then of the capped logits.
    """

    def nll(self, h_BxTxD: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """-log p(target | h) and log Z, float32 (B, T)."""
        ...

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """Float32 (B, T, V)."""
        ...

    def top_k(self, h_BxTxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k most probable tokens, in order; of equals, the lowest id first.

        Returns:
            log_probs: float32 (B, T, k). tokens: int32 (B, T, k).

        Raises:
            UserError: k is not in 1 .. V.
        """
        ...

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

        Under a mesh the rules must leave `batch` whole.

        Args:
            key: a typed PRNG key.
            temperature, top_k, top_p: see `ops.sampling.sample`.

        Raises:
            UserError: top_k is not positive.
        """
        ...

    def sampler(
        self,
        *,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | jax.Array | None = None,
    ) -> Sampler:
        """`sample` as a function of h and key, for loops: what depends on neither is done here."""
        ...


class FullHead(nnx.Module):
    """One vector per token: z = W h + b, the product optionally soft-capped."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        token_bias: bool = False,
        logit_soft_cap: float | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        weights = 0.02 * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
        self.weights = param(weights, ("vocab", "embed"))
        if token_bias:
            self.bias = param(jnp.zeros((vocab_size,), jnp.float32), ("vocab",), decay=False)
        self.has_bias = token_bias
        self.logit_soft_cap = logit_soft_cap
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def _arrays(self) -> tuple[jax.Array, jax.Array | None]:
        weights = constrain(self.weights[...].astype(self.dtype), ("vocab", None), self.rules)
        return weights, self.bias[...] if self.has_bias else None

    def nll(self, h_BxTxD: jax.Array, targets_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.nll`."""
        weights, bias = self._arrays()
        targets_BxT = constrain(targets_BxT, ROWS, self.rules)
        return softmax.nll(h_BxTxD, weights, targets_BxT, bias, cap=self.logit_soft_cap)

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`."""
        weights, bias = self._arrays()
        z_BxTxV = soft_cap.soft_cap(softmax.logits(h_BxTxD, weights), self.logit_soft_cap)
        return z_BxTxV if bias is None else z_BxTxV + bias

    def top_k(self, h_BxTxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """See `Head.top_k`."""
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
        """See `Head.sample`."""
        return self.sampler(temperature=temperature, top_k=top_k, top_p=top_p)(h_BxTxD, key)

    def sampler(
        self,
        *,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | jax.Array | None = None,
    ) -> Sampler:
        """See `Head.sampler`."""

        def sample(h_BxTxD: jax.Array, key: jax.Array) -> jax.Array:
            logits_BxTxV = self._whole_logits(h_BxTxD)
            return sampling.sample(
                logits_BxTxV, key, temperature=temperature, top_k=top_k, top_p=top_p
            )

        return sample

    def _whole_logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """Logits of which every device has the whole vocabulary, which sorting needs."""
        return constrain(self.logits(h_BxTxD), HIDDEN, self.rules)


class VQHead(nnx.Module):
    """VQ-Logits: token v has the logit codes[assignment[v]] . h + bias[v].

    Args:
        assignment: int (V,), values in [0, num_codes); see `vqcx_jax.assignment`.
        codes: float32 (num_codes, dim) to start from, or None for random.
        logit_soft_cap: caps code logits; biases are added after it.
    """

    def __init__(
        self,
        assignment: jax.Array,
        num_codes: int,
        dim: int,
        *,
        token_bias: bool = True,
        logit_soft_cap: float | None = None,
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
        self.logit_soft_cap = logit_soft_cap
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
        nll = partial(codebook.nll, cap=self.logit_soft_cap)
        return per_device(nll, axes, (ROWS, ROWS), self.rules)(*args)

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`."""
        codes, assignment, bias = self._arrays()
        z_BxTxV = self._code_logits(h_BxTxD, codes)[..., assignment]
        return z_BxTxV if bias is None else z_BxTxV + bias

    def top_k(self, h_BxTxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """See `Head.top_k`. O(K + k^2) per position, after a sort of V biases for all of them."""
        codes, assignment, bias = self._arrays()
        num_codes = codes.shape[0]
        l_BxTxK = self._code_logits(h_BxTxD, codes)
        table = codebook_sampling.token_table(assignment, num_codes, bias)
        z_BxTxk, tokens_BxTxk = self._listed(l_BxTxK, table, k)
        log_mass_K = codebook.code_log_mass(assignment, num_codes, bias)
        log_z_BxTx1 = jax.nn.logsumexp(l_BxTxK + log_mass_K, axis=-1, keepdims=True)
        return z_BxTxk - log_z_BxTx1, tokens_BxTxk

    def sample(
        self,
        h_BxTxD: jax.Array,
        key: jax.Array,
        *,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | jax.Array | None = None,
    ) -> jax.Array:
        """See `Head.sample`."""
        return self.sampler(temperature=temperature, top_k=top_k, top_p=top_p)(h_BxTxD, key)

    def sampler(
        self,
        *,
        temperature: float | jax.Array = 1.0,
        top_k: int | None = None,
        top_p: float | jax.Array | None = None,
    ) -> Sampler:
        """See `Head.sampler`. O(K) per position, and O(k^2) more with top_k.

        V logits are made, and sorted, for top_p without top_k alone: a nucleus has no bound on its
        size.
        """
        if top_k is None and top_p is not None:
            return lambda h_BxTxD, key: sampling.sample(
                self.logits(h_BxTxD), key, temperature=temperature, top_p=top_p
            )
        # Not kept as buffers: the order follows from the biases, which training changes.
        codes, assignment, bias = self._arrays()
        table = codebook_sampling.token_table(assignment, codes.shape[0], bias)
        if top_k is None:
            draw = codebook_sampling.sampler(table, temperature)
            return lambda h_BxTxD, key: draw(self._code_logits(h_BxTxD, codes), key)
        k = min(top_k, assignment.shape[0])

        def sample(h_BxTxD: jax.Array, key: jax.Array) -> jax.Array:
            listed = self._listed(self._code_logits(h_BxTxD, codes), table, k)
            return sampling.sample_listed(*listed, key, temperature=temperature, top_p=top_p)

        return sample

    def _code_logits(self, h_BxTxD: jax.Array, codes: jax.Array) -> jax.Array:
        return soft_cap.soft_cap(codebook.code_logits(h_BxTxD, codes), self.logit_soft_cap)

    def _listed(
        self, l_BxTxK: jax.Array, table: codebook_sampling.TokenTable, k: int
    ) -> tuple[jax.Array, jax.Array]:
        """Logits and tokens of the k most probable."""
        top_k = partial(codebook_sampling.top_k, k=k)
        return per_device(top_k, [HIDDEN, (None,)], (HIDDEN, HIDDEN), self.rules)(l_BxTxK, table)
