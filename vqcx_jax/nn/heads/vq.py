"""VQ-Logits with one codebook: everything but V logits in O(K) per position."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.config.schema.types import HeadImplementation
from vqcx_jax.nn.heads.base import Head, Sampler, named
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops import codebook, sampling, soft_cap
from vqcx_jax.ops.checks import check_positive, check_shape
from vqcx_jax.ops.codebook import sampling as codebook_sampling
from vqcx_jax.ops.soft_cap import check_cap
from vqcx_jax.sharding import LogicalAxes, constrain, per_device


class VQHead(Head):
    """VQ-Logits: token v has the logit codes[assignment[v]] . h + bias[v].

    Args:
        assignment: int (V,), values in [0, num_codes); see `vqcx_jax.maps`.
        codes: float32 (num_codes, dim) to start from, or None for random.
        logit_soft_cap: caps code logits; biases are added after it.
        implementation: "auto": kernels, on devices that have them; "xla": plain JAX alone.

    Raises:
        UserError: sizes or shapes that do not fit, codes outside [0, num_codes), more codes than
            tokens, or a cap that is not positive.
    """

    def __init__(
        self,
        assignment: jax.Array,
        num_codes: int,
        dim: int,
        *,
        token_bias: bool = True,
        logit_soft_cap: float | None = None,
        implementation: HeadImplementation = "auto",
        codes: jax.Array | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        check_cap(logit_soft_cap, "logit_soft_cap")
        check_shape("assignment", assignment, assignment.shape[:1])
        check_positive(num_codes=num_codes, dim=dim)
        codebook.check_codes(assignment, num_codes)
        check_shape("codes", codes, (num_codes, dim))
        if codes is None:
            codes = 0.02 * jax.random.normal(rngs.params(), (num_codes, dim), jnp.float32)
        self.codes = param(codes, ("codes", "embed"))
        self.assignment = buffer(jnp.asarray(assignment, jnp.int32), (None,))
        if token_bias:
            zeros = jnp.zeros(assignment.shape, jnp.float32)
            self.bias = param(zeros, (None,), decay=False)
        self.has_bias = token_bias
        self.vocab_size = len(assignment)
        self.logit_soft_cap = logit_soft_cap
        self.named = named(implementation)
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def _arrays(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        codes = constrain(self.codes[...].astype(self.dtype), (None, None), self.rules)
        return codes, self.assignment[...], self.bias[...] if self.has_bias else None

    def token_nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.token_nll`. O(K) per position: no array of V columns is made."""
        codes, assignment, bias = self._arrays()
        args = [h_BxTxD, codes, assignment, tokens_BxT]
        axes: list[LogicalAxes] = [HIDDEN, (None, None), (None,), ROWS]
        if bias is not None:
            args.append(bias)
            axes.append((None,))
        nll = partial(codebook.nll, cap=self.logit_soft_cap)
        return per_device(nll, axes, (ROWS, ROWS), self.rules)(*args)

    def summed_nll(
        self,
        h_BxTxD: jax.Array,
        targets_BxT: jax.Array,
        is_token_BxT: jax.Array,
        z_loss: float | jax.Array = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Head.summed_nll`. On TPUs by a kernel that makes gradients along with the loss."""

        def sums(
            h: jax.Array, tokens: jax.Array, counts: jax.Array, z_loss: jax.Array, *arrays: Any
        ) -> tuple[jax.Array, jax.Array]:
            codes, assignment, bias = arrays
            return codebook.summed_nll(
                h,
                codes,
                assignment,
                tokens,
                counts,
                bias,
                z_loss,
                cap=self.logit_soft_cap,
                implementation=self.named,
            )

        axes: list[LogicalAxes] = [(None, None), (None,), (None,)]
        labelled = (h_BxTxD, targets_BxT, is_token_BxT)
        return self._over_devices(sums, *labelled, z_loss, self._arrays(), axes)

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

    def token_sampler(
        self,
        *,
        temperature: float | jax.Array,
        top_k: int | None,
        top_p: float | jax.Array | None,
    ) -> Sampler:
        """See `Head.sampler`. O(K) per position, and O(k^2) more with top_k; never V logits."""
        # Not kept as buffers: the order follows from the biases, which training changes.
        codes, assignment, bias = self._arrays()
        table = codebook_sampling.token_table(assignment, codes.shape[0], bias)
        if top_k is None:
            draw = codebook_sampling.sampler(table, temperature, top_p)
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
