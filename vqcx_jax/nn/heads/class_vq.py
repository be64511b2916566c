"""VQ-Logits with product codes in classes: no sum over the vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.config.schema.types import HeadImplementation
from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.base import Sampler, named
from vqcx_jax.nn.heads.normalized import NormalizedHead, whole
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops import device, sampling
from vqcx_jax.ops.checks import check_positive, check_shape
from vqcx_jax.ops.codebook import check_codes, class_sampling, classes
from vqcx_jax.sharding import per_device


class ClassVQHead(NormalizedHead):
    """p(token | h) = p(class | h) p(token | class, h), see `ops.codebook.classes`.

    Args:
        tokens: which tokens are frequent and which are in a class, from `codebook.classes.arrange`.
        assignment: int (V + C, M), codes of all tokens, then of all classes, in [0, num_codes).
        num_codes: K.
        token_scale: train a factor for each token and each class.
        implementation: "auto": kernels, on devices that have them; "xla": plain JAX alone.
        codebooks: float32 (M, K, D / M) to start from, or None for random.
        scale: float32 (V + C,) to start from, or None for ones.

    Raises:
        UserError: shapes that do not fit, or codes outside [0, num_codes).
    """

    def __init__(
        self,
        tokens: classes.Classes,
        assignment: jax.Array,
        num_codes: int,
        dim: int,
        *,
        token_bias: bool = True,
        token_scale: bool = False,
        implementation: HeadImplementation = "auto",
        codebooks: jax.Array | None = None,
        scale: jax.Array | None = None,
        dtype: jnp.dtype = jnp.float32,
        rules: ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        vocab_size, num_nodes = len(tokens.entry_of), len(tokens.entry_of) + len(tokens.members)
        if assignment.ndim != 2 or len(assignment) != num_nodes:
            raise UserError(
                f"assignment has shape {assignment.shape}: must have {num_nodes} rows, for "
                f"{vocab_size} tokens and {len(tokens.members)} classes"
            )
        num_codebooks = assignment.shape[1]
        check_positive(num_codebooks=num_codebooks, num_codes=num_codes, dim=dim)
        check_codes(assignment, num_codes, vocab_size)
        if dim % num_codebooks:
            raise UserError(f"dim={dim}: must be a multiple of the {num_codebooks} codebooks")
        shape = (num_codebooks, num_codes, dim // num_codebooks)
        check_shape("codebooks", codebooks, shape)
        check_shape("scale", scale, (num_nodes,))
        if scale is not None and not token_scale:
            raise UserError("scale is given; token_scale=False has none")
        if codebooks is None:
            codebooks = 0.02 * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.codebooks = param(codebooks, (None, "codes", None))
        if token_bias:
            self.bias = param(jnp.zeros((num_nodes,), jnp.float32), (None,), decay=False)
        if token_scale:
            scale = jnp.ones((num_nodes,), jnp.float32) if scale is None else scale
            self.scale = param(scale, (None,), decay=False)
        codes = classes.arrange_codes(assignment, tokens, num_codes)
        self.assignment = buffer(codes.of_nodes, (None, None))
        self.entry_codes = buffer(codes.of_entries, (None, None))
        self.member_codes = buffer(codes.of_members, (None, None, None))
        self.entries = buffer(tokens.entries, (None,))
        self.entry_of = buffer(tokens.entry_of, (None,))
        self.members = buffer(tokens.members, (None, None))
        self.rank_of = buffer(tokens.rank_of, (None,))
        self.has_bias = token_bias
        self.has_scale = token_scale
        self.vocab_size = vocab_size
        self.named = named(implementation)
        self.dtype = dtype
        self.rules = rules or ShardingRules()

    def summed_nll(
        self,
        h_BxTxD: jax.Array,
        targets_BxT: jax.Array,
        is_token_BxT: jax.Array,
        z_loss: float | jax.Array = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Head.summed_nll`. log Z is 0. On TPUs by kernels, without logits in memory."""

        def sums(
            h: jax.Array, tokens: jax.Array, counts: jax.Array, _: jax.Array, arrays: Any
        ) -> tuple[jax.Array, jax.Array]:
            weights, in_classes = arrays
            nll = classes.summed_nll(
                h,
                weights,
                in_classes,
                tokens,
                counts,
                implementation=self.named,
                product_dtype=self.dtype,
            )
            return nll, jax.lax.stop_gradient(nll)

        labelled = (h_BxTxD, targets_BxT, is_token_BxT)
        return self._over_devices(sums, *labelled, z_loss, [self._arrays()], [()])

    def top_k(self, h_BxTxD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """See `Head.top_k`. On CPUs without V logits, see `ops.codebook.class_sampling`."""
        if not self._looks_into_classes():
            return super().top_k(h_BxTxD, k)
        arrays = self._arrays()
        return self._listed(h_BxTxD, classes.entry_vectors(*arrays), arrays, k)

    def token_sampler(
        self,
        *,
        temperature: float | jax.Array,
        top_k: int | None,
        top_p: float | jax.Array | None,
    ) -> Sampler:
        """See `Head.sampler`.

        On CPUs mostly without V logits, see `ops.codebook.class_sampling`. Elsewhere there are none
        at temperature 1 without top-k and top-p: a product of two tempered softmaxes is not the
        tempered softmax of the product.
        """
        arrays = self._arrays()
        weights, tokens = arrays
        vectors, num_frequent = classes.entry_vectors(weights, tokens), classes.num_frequent(tokens)
        options: Any = {"temperature": temperature, "top_p": top_p}
        if self._looks_into_classes():
            if top_k is None:
                return lambda h_BxTxD, key: class_sampling.sample(
                    h_BxTxD, vectors, *arrays, key, **options
                )
            k = min(top_k, self.vocab_size)
            return lambda h_BxTxD, key: sampling.sample_listed(
                *self._listed(h_BxTxD, vectors, arrays, k), key, **options
            )
        by_logits = super().token_sampler(top_k=top_k, **options)
        if top_k is not None or top_p is not None:
            return by_logits

        def sample(h_BxTxD: jax.Array, key: jax.Array) -> jax.Array:
            entry_key, member_key = jax.random.split(key)
            entry_logits = classes.entry_logits(h_BxTxD, vectors, weights, tokens)
            entry = sampling.sample(entry_logits, entry_key)
            class_ = jnp.maximum(entry - num_frequent, 0)
            member_logits = classes.member_logits(h_BxTxD, weights, tokens, class_)
            member = tokens.members[class_, sampling.sample(member_logits, member_key)]
            return jnp.where(entry < num_frequent, tokens.entries[entry], member)

        is_plain = jnp.asarray(temperature) == 1
        return lambda h_BxTxD, key: jax.lax.cond(is_plain, sample, by_logits, h_BxTxD, key)

    def embed(self, tokens_BxT: jax.Array) -> jax.Array:
        """The vectors of the tokens, (B, T, D): an input embedding tied to the output layer."""

        def embed(tokens_BxT: jax.Array, arrays: Any) -> tuple[jax.Array]:
            weights, _ = arrays
            return (classes.token_vectors(weights, tokens_BxT),)

        return per_device(embed, [ROWS, ()], [HIDDEN], self.rules)(tokens_BxT, self._arrays())[0]

    def _looks_into_classes(self) -> bool:
        """Accelerators make all logits at once: they have one program for it, and no loop."""
        return device.current().platform == "cpu"

    def _listed(
        self, h_BxTxD: jax.Array, vectors: jax.Array, arrays: Any, k: int
    ) -> tuple[jax.Array, jax.Array]:
        def listed(h_BxTxD: jax.Array, vectors: jax.Array, arrays: Any) -> Any:
            weights, tokens = arrays
            return class_sampling.top_k(h_BxTxD, vectors, weights, tokens, k)

        run = per_device(listed, [HIDDEN, (), ()], (HIDDEN, HIDDEN), self.rules)
        return run(h_BxTxD, vectors, arrays)

    def _arrays(self) -> tuple[classes.Weights, classes.Classes]:
        codes = self.assignment, self.entry_codes, self.member_codes
        weights = classes.Weights(
            whole(self.codebooks, self.rules, self.dtype),
            classes.Codes(*(x[...] for x in codes)),
            self.scale[...] if self.has_scale else None,
            self.bias[...] if self.has_bias else None,
        )
        buffers = (self.entries, self.entry_of, self.members, self.rank_of)
        return weights, classes.Classes(*(x[...] for x in buffers))

    def _nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array, arrays: Any) -> jax.Array:
        weights, tokens = arrays
        options: Any = {"implementation": self.named, "product_dtype": self.dtype}
        return classes.nll(h_BxTxD, weights, tokens, tokens_BxT, **options)

    def _log_probs(self, h_BxTxD: jax.Array, arrays: Any) -> jax.Array:
        return classes.log_probs(h_BxTxD, *arrays, implementation=self.named)
