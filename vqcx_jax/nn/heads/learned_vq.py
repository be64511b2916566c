"""VQ-Logits whose token map is learned along with everything else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.multi_vq import MultiVQHead
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import buffer, param
from vqcx_jax.ops import softmax
from vqcx_jax.ops.codebook import straight_through
from vqcx_jax.sharding import LogicalAxes, per_device

# e^4 / (e^4 + 3) = 95% of the draws among four candidates are the code a token starts with.
_START = 4.0


class LearnedVQHead(MultiVQHead):
    """A `MultiVQHead` that also learns which codes tokens have.

    Every token chooses, in each codebook, among the codes nearest to the one it starts with, by
    straight-through Gumbel-softmax (`ops.codebook.straight_through`). `token_map` then gives the
    codes that won, for a head that does not learn them. While they are learned there are V M C
    scores more to train, and the loss is that of expanded vectors.

    Args:
        num_candidates: C.
        gumbel: draw codes while training, and not only for the gradient's sake. The noise is made
            from labels and scores, so that it is new in each step, and the same after a restart and
            on every mesh.
        options: of `MultiVQHead`, without soft-cap and `expand_vectors`.

    Raises:
        UserError: as `MultiVQHead`; num_candidates is not in 1 .. num_codes; or a soft-cap.
    """

    def __init__(
        self,
        assignment: jax.Array,
        num_codes: int,
        dim: int,
        *,
        num_candidates: int,
        gumbel: bool = True,
        **options: Any,
    ):
        if not 1 <= num_candidates <= num_codes:
            raise UserError(f"num_candidates={num_candidates}: must be in 1 .. {num_codes}")
        for name in ("logit_soft_cap", "expand_vectors"):
            if options.get(name) is not None:
                raise UserError(f"{name}={options[name]}: must be None where codes are learned")
        super().__init__(assignment, num_codes, dim, **options)
        self.sums_pairs = False  # Scores get their gradients from `token_nll`.
        neighbours = straight_through.nearest_codes(self.codebooks[...], num_candidates)
        self.neighbours = buffer(neighbours, (None, None, None))
        start = jnp.zeros((*assignment.shape, num_candidates), jnp.float32).at[..., 0].set(_START)
        self.scores = param(start, (None, None, None), decay=False)
        self.gumbel = gumbel
        self.deterministic = False  # As in Flax: `model.eval()` sets it.

    def token_map(self) -> jax.Array:
        """The codes that have won, int32 (V, M)."""
        candidates_VxMxC = self._candidates(self.assignment[...], self.neighbours[...])
        return straight_through.chosen(candidates_VxMxC, self.scores[...]).astype(jnp.int32)

    def token_nll(self, h_BxTxD: jax.Array, tokens_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """See `Head.token_nll`. Of codes that are drawn, if `gumbel`, until `model.eval()`."""
        key = None
        if self.gumbel and not self.deterministic:
            key = straight_through.noise_key(tokens_BxT, self.scores[...])

        def nll(
            h_BxTxD: jax.Array, tokens_BxT: jax.Array, key: jax.Array | None, arrays: Any
        ) -> tuple[jax.Array, jax.Array]:
            weights_VxD = self._drawn_vectors(arrays, key)
            return softmax.streamed_nll(h_BxTxD, weights_VxD, tokens_BxT, arrays.get("bias"))

        axes: list[LogicalAxes] = [HIDDEN, ROWS, (), ()]
        arrays = self._arrays() | {
            "assignment": self.assignment[...],
            "neighbours": self.neighbours[...],
            "scores": self.scores[...],
        }
        return per_device(nll, axes, (ROWS, ROWS), self.rules)(h_BxTxD, tokens_BxT, key, arrays)

    def _arrays(self) -> dict[str, jax.Array]:
        return super()._arrays() | {"assignment": self.token_map()}

    def _candidates(self, assignment_VxM: jax.Array, neighbours_MxKxC: jax.Array) -> jax.Array:
        m = jnp.arange(assignment_VxM.shape[1])
        return neighbours_MxKxC[m, assignment_VxM]

    def _drawn_vectors(self, arrays: dict[str, Any], key: jax.Array | None) -> jax.Array:
        candidates_VxMxC = self._candidates(arrays["assignment"], arrays["neighbours"])
        num_codebooks = candidates_VxMxC.shape[1]
        keys = [None] * num_codebooks if key is None else jax.random.split(key, num_codebooks)
        parts = [
            straight_through.code_vectors(
                arrays["codebooks"][m].astype(jnp.float32),
                candidates_VxMxC[:, m],
                arrays["scores"][:, m],
                keys[m],
            )
            for m in range(num_codebooks)
        ]
        if self.form == "product":
            return self._scaled(jnp.concatenate(parts, axis=-1), arrays)
        return self._scaled(functools.reduce(jnp.add, parts), arrays)
