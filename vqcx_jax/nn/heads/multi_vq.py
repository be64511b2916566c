"""VQ-Logits with several codebooks: every token can have a logit of its own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.config.schema.types import HeadImplementation
from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.base import Head, Sampler, named
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops import device, sampling, soft_cap, softmax
from vqcx_jax.ops.checks import check_per_token, check_positive, check_shape
from vqcx_jax.ops.codebook import check_codes, loss, multi
from vqcx_jax.ops.codebook.cell_sampling import cell_sampler
from vqcx_jax.ops.codebook.checks import check_own_tokens
from vqcx_jax.ops.codebook.multi import Form
from vqcx_jax.ops.soft_cap import check_cap
from vqcx_jax.sharding import LogicalAxes, constrain, per_device


class MultiVQHead(Head):
    """VQ-Logits with M codebooks of K codes each.

    Token v has the logit
        z_v = scale[v] sum_m codebooks[m][assignment[v, m]] . h_m + bias[v],
    where h_m is h ("additive") or its m-th slice of D/M ("product"). Tokens in `own_tokens` have
    an own vector instead of codes.

    Args:
        assignment: int (V, M), values in [0, num_codes); see `vqcx_jax.maps`.
        num_codes: K.
        own_tokens: int (T,), distinct tokens; None: none.
        token_scale: train a factor for each token. (M = 2 does not close with it.)
        expand_vectors: where the loss has no closed form (M > 2 or scales), build all V token
            vectors anew in each step and stream a full softmax over them, which is what matrix
            units are good at; False: stream over codes, which is less work for wide models. None:
            True, unless there is a soft-cap, which vectors cannot have; the device is a TPU, whose
            kernel (if `implementation` lets it) multiplies by M K codes, and they are fewer than D;
            or it is a CPU, and 8 M is at most D (measured, see docs/output_layer.md).
        logit_soft_cap: caps the code logits of each codebook to cap / M, so that a token's logit is
            within the cap (with scales, within scale times the cap) before its bias; own tokens
            directly.
        implementation: "auto": kernels, on devices that have them; "xla": plain JAX alone.
        codebooks: float32 (M, K, D or D/M) to start from, or None for random.
        scale, own_vectors: float32 (V,) and (T, D) to start from, or None for ones and random.

    Raises:
        UserError: shapes that do not fit, codes or own tokens out of range, a cap that is not
            positive, or an option that another one makes void.
    """

    def __init__(
        self,
        assignment: jax.Array,
        num_codes: int,
        dim: int,
        *,
        form: Form = "additive",
        own_tokens: jax.Array | None = None,
        token_bias: bool = True,
        token_scale: bool = False,
        expand_vectors: bool | None = None,
        logit_soft_cap: float | None = None,
        implementation: HeadImplementation = "auto",
        codebooks: jax.Array | None = None,
        scale: jax.Array | None = None,
        own_vectors: jax.Array | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        if assignment.ndim != 2:
            raise UserError(f"assignment has shape {assignment.shape}; it must be (V, M)")
        vocab_size, num_codebooks = assignment.shape
        check_positive(num_codebooks=num_codebooks, num_codes=num_codes, dim=dim)
        check_codes(assignment, num_codes)
        multi.check_form(form)
        check_cap(logit_soft_cap, "logit_soft_cap")
        if form == "product" and dim % num_codebooks:
            raise UserError(f"dim={dim}: must be a multiple of the {num_codebooks} codebooks")
        if expand_vectors and logit_soft_cap is not None:
            raise UserError(
                f"expand_vectors=True: must be False or None with logit_soft_cap={logit_soft_cap}"
            )
        self.closes = num_codebooks <= 2 and not token_scale
        if expand_vectors and self.closes:
            raise UserError(
                "expand_vectors=True: must be False or None with one or two codebooks without "
                "scales, whose loss has a closed form"
            )
        if scale is not None and not token_scale:
            raise UserError("scale is given; token_scale=False has none")
        if own_vectors is not None and own_tokens is None:
            raise UserError("own_vectors are given; own_tokens=None has none")
        width = dim // num_codebooks if form == "product" else dim
        check_shape("codebooks", codebooks, (num_codebooks, num_codes, width))
        check_per_token("scale", scale, vocab_size)
        if codebooks is None:
            # The sum of M codes starts as large as the one vector of a full head.
            std = 0.02 if form == "product" else 0.02 * num_codebooks**-0.5
            shape = (num_codebooks, num_codes, width)
            codebooks = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        embed = None if form == "product" else "embed"
        self.codebooks = param(codebooks, (None, "codes", embed))
        self.assignment = buffer(jnp.asarray(assignment, jnp.int32), (None, None))
        if own_tokens is not None:
            check_own_tokens(own_tokens, vocab_size)
            own_shape = (len(own_tokens), dim)
            check_shape("own_vectors", own_vectors, own_shape)
            if own_vectors is None:
                own_vectors = 0.02 * jax.random.normal(rngs.params(), own_shape, jnp.float32)
            self.own_vectors = param(own_vectors, (None, "embed"))
            self.own_tokens = buffer(jnp.asarray(own_tokens, jnp.int32), (None,))
        if token_bias:
            self.bias = param(jnp.zeros((vocab_size,), jnp.float32), (None,), decay=False)
        if token_scale:
            scale = jnp.ones((vocab_size,), jnp.float32) if scale is None else scale
            self.scale = param(scale, (None,), decay=False)
        may_expand = not self.closes and logit_soft_cap is None
        self.expand_vectors = expand_vectors if may_expand else False
        self.sums_pairs = self.closes and num_codebooks == 2 and own_tokens is None
        self.form: Form = form
        self.has_own = own_tokens is not None
        self.has_bias = token_bias
        self.has_scale = token_scale
        self.vocab_size = vocab_size
        self.logit_soft_cap = logit_soft_cap
        self.named = named(implementation)
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def token_nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.token_nll`. No N x V logits are kept."""

        def nll(
            h_BxTxD: jax.Array, tokens_BxT: jax.Array, arrays: dict[str, Any]
        ) -> tuple[jax.Array, jax.Array]:
            bias, scale = arrays.get("bias"), arrays.get("scale")
            if self.expands():
                weights_VxD = self._vectors(arrays)
                return softmax.streamed_nll(h_BxTxD, weights_VxD, tokens_BxT, bias)
            code_logits, own = self._code_logits(h_BxTxD, arrays)
            codes = arrays["assignment"]
            return loss.nll(
                code_logits,
                codes,
                tokens_BxT,
                bias,
                scale,
                own,
                implementation=self.named,
                product_dtype=self.dtype,
            )

        axes: list[LogicalAxes] = [HIDDEN, ROWS, ()]
        arrays = self._arrays()
        return per_device(nll, axes, (ROWS, ROWS), self.rules)(h_BxTxD, tokens_BxT, arrays)

    def summed_nll(
        self,
        h_BxTxD: jax.Array,
        targets_BxT: jax.Array,
        is_token_BxT: jax.Array,
        z_loss: float | jax.Array = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Head.summed_nll`. Two codebooks that close have a TPU kernel, gradients included."""
        labelled = (h_BxTxD, targets_BxT, is_token_BxT)
        if not self.sums_pairs:
            return super().summed_nll(*labelled, z_loss)
        cap = None if self.logit_soft_cap is None else self.logit_soft_cap / 2

        def sums(
            h: jax.Array,
            tokens: jax.Array,
            counts: jax.Array,
            z_loss: jax.Array,
            arrays: dict[str, Any],
        ) -> tuple[jax.Array, jax.Array]:
            return loss.summed_nll(
                h,
                tuple(arrays["codebooks"]),
                arrays["assignment"],
                tokens,
                counts,
                arrays.get("bias"),
                z_loss,
                form=self.form,
                cap=cap,
                implementation=self.named,
            )

        return self._over_devices(sums, *labelled, z_loss, [self._arrays()], [()])

    def logits(self, h_BxTxD: jax.Array) -> jax.Array:
        """See `Head.logits`."""

        def logits(h_BxTxD: jax.Array, arrays: dict[str, Any]) -> tuple[jax.Array]:
            code_logits, own = self._code_logits(h_BxTxD, arrays)
            bias, scale = arrays.get("bias"), arrays.get("scale")
            codes = arrays["assignment"]
            return (loss.logits(code_logits, codes, bias, scale, own, implementation=self.named),)

        return per_device(logits, [HIDDEN, ()], [HIDDEN], self.rules)(h_BxTxD, self._arrays())[0]

    def top_k(self, h_BxTxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """See `Head.top_k`. Without V logits on TPUs, by a kernel that sums log Z as well."""
        z_BxTxk, tokens_BxTxk, log_z_BxTx1 = self._listed(h_BxTxD, self._arrays(), k)
        return z_BxTxk - log_z_BxTx1, tokens_BxTxk

    def token_sampler(
        self,
        *,
        temperature: float | jax.Array,
        top_k: int | None,
        top_p: float | jax.Array | None,
    ) -> Sampler:
        """See `Head.sampler`. Top-k as in `top_k`; else without V logits if the loss closes.

        V logits are made for top_p without top_k: a nucleus has no bound on its size.
        """
        arrays = self._arrays()
        if top_k is not None:
            k = min(top_k, self.vocab_size)

            def sample_best(h_BxTxD: jax.Array, key: jax.Array) -> jax.Array:
                z_BxTxk, tokens_BxTxk, _ = self._listed(h_BxTxD, arrays, k)
                return sampling.sample_listed(
                    z_BxTxk, tokens_BxTxk, key, temperature=temperature, top_p=top_p
                )

            return sample_best
        if top_p is not None or not self.closes:
            return super().token_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        bias = arrays.get("bias", jnp.zeros((self.vocab_size,), jnp.float32))
        num_codebooks, num_codes, _ = self.codebooks.shape
        draw = cell_sampler(
            arrays["assignment"],
            (num_codes,) * num_codebooks,
            bias,
            arrays.get("own_tokens"),
            temperature,
        )

        def sample(h_BxTxD: jax.Array, key: jax.Array) -> jax.Array:
            code_logits, own = self._code_logits(h_BxTxD, arrays)
            own_logits = None if own is None else own.logits + bias[own.tokens]
            return draw(code_logits, own_logits, key)

        return sample

    def embed(self, tokens_BxT: jax.Array) -> jax.Array:
        """The vectors of the tokens, (B, T, D): an input embedding tied to the output layer."""

        def embed(tokens_BxT: jax.Array, arrays: dict[str, Any]) -> tuple[jax.Array]:
            of_form = multi.product_vectors if self.form == "product" else multi.additive_vectors
            codes = arrays["assignment"][tokens_BxT]
            x_BxTxD = of_form(arrays["codebooks"].astype(jnp.float32), codes)
            if self.has_scale:
                x_BxTxD = x_BxTxD * arrays["scale"][tokens_BxT][..., None]
            if self.has_own:
                is_own_BxTxO = tokens_BxT[..., None] == arrays["own_tokens"]
                own_vectors = arrays["own_vectors"].astype(jnp.float32)
                own_BxTxD = is_own_BxTxO.astype(jnp.float32) @ own_vectors
                x_BxTxD = jnp.where(jnp.any(is_own_BxTxO, -1, keepdims=True), own_BxTxD, x_BxTxD)
            return (x_BxTxD.astype(self.dtype),)

        return per_device(embed, [ROWS, ()], [HIDDEN], self.rules)(tokens_BxT, self._arrays())[0]

    def _arrays(self) -> dict[str, jax.Array]:
        codebooks = self.codebooks[...].astype(self.dtype)
        arrays = {
            "codebooks": constrain(codebooks, (None, None, None), self.rules),
            "assignment": self.assignment[...],
        }
        if self.has_own:
            vectors = self.own_vectors[...].astype(self.dtype)
            arrays["own_vectors"] = constrain(vectors, (None, None), self.rules)
            arrays["own_tokens"] = self.own_tokens[...]
        if self.has_bias:
            arrays["bias"] = self.bias[...]
        if self.has_scale:
            arrays["scale"] = self.scale[...]
        return arrays

    def expands(self) -> bool:
        """Whether the loss goes by the vectors of all tokens, see `expand_vectors`."""
        if self.expand_vectors is not None:
            return self.expand_vectors
        num_codebooks, num_codes, width = self.codebooks.shape
        dim = num_codebooks * width if self.form == "product" else width
        platform = device.current().platform
        if platform == "cpu":
            return dim < 8 * num_codebooks
        has_kernel = platform == "tpu" and self.named is None
        return not (has_kernel and num_codebooks * num_codes < dim)

    def _vectors(self, arrays: dict[str, Any]) -> jax.Array:
        """The vectors of all tokens, (V, D)."""
        of_form = multi.product_vectors if self.form == "product" else multi.additive_vectors
        weights_VxD = of_form(arrays["codebooks"].astype(jnp.float32), arrays["assignment"])
        return self._scaled(weights_VxD, arrays)

    def _scaled(self, weights_VxD: jax.Array, arrays: dict[str, Any]) -> jax.Array:
        """Vectors from codes, with scales, and with own vectors where tokens have one."""
        if self.has_scale:
            weights_VxD = weights_VxD * arrays["scale"][:, None]
        weights_VxD = weights_VxD.astype(self.dtype)
        if self.has_own:
            weights_VxD = weights_VxD.at[arrays["own_tokens"]].set(arrays["own_vectors"])
        return weights_VxD

    def _listed(
        self, h_BxTxD: jax.Array, arrays: dict[str, Any], k: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Logits and tokens of the k most probable, (B, T, k), and log Z, (B, T, 1)."""

        def listed(
            h_BxTxD: jax.Array, arrays: dict[str, Any]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            code_logits, own = self._code_logits(h_BxTxD, arrays)
            bias, scale = arrays.get("bias"), arrays.get("scale")
            z, tokens, log_z = loss.top_k(
                code_logits,
                arrays["assignment"],
                k,
                bias,
                scale,
                own,
                implementation=self.named,
            )
            return z, tokens, log_z[..., None]

        return per_device(listed, [HIDDEN, ()], [HIDDEN] * 3, self.rules)(h_BxTxD, arrays)

    def _code_logits(
        self, h_BxTxD: jax.Array, arrays: dict[str, Any]
    ) -> tuple[multi.CodeLogits, loss.Own | None]:
        code_logits = multi.code_logits(h_BxTxD, arrays["codebooks"], self.form)
        cap = self.logit_soft_cap
        if cap is not None:
            code_logits = tuple(soft_cap.soft_cap(l, cap / len(code_logits)) for l in code_logits)
        if not self.has_own:
            return code_logits, None
        own_logits = soft_cap.soft_cap(softmax.logits(h_BxTxD, arrays["own_vectors"]), cap)
        return code_logits, loss.Own(arrays["own_tokens"], own_logits)
