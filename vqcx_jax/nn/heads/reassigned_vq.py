"""VQ-Logits whose tokens change their codes while the model is trained."""

from typing import Any

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.nn.heads.multi_vq import MultiVQHead
from vqcx_jax.nn.layers import HIDDEN, ROWS
from vqcx_jax.nn.variables import buffer
from vqcx_jax.ops.codebook import reassign
from vqcx_jax.ops.codebook.reassign import Statistics
from vqcx_jax.sharding import constrain, per_device, token_mesh_axes

# A token moves when the running mean of its hidden states is that of so many positions.
_MIN_COUNT = 8.0
_SUMS = (None, "embed")


class ReassignedVQHead(MultiVQHead):
    """A `MultiVQHead` whose map follows the hidden states (`ops.codebook.reassign`).

    It keeps V D numbers more. Code vectors and their optimizer state are what they are when a token
    changes its code; own tokens are not touched.

    Args:
        every: steps from one reassignment to the next.
        decay: per step, of the running statistics.
        options: of `MultiVQHead`.

    Raises:
        UserError: as `MultiVQHead`; every is not positive; or decay is not between 0 and 1.
    """

    def __init__(
        self,
        assignment: jax.Array,
        num_codes: int,
        dim: int,
        *,
        every: int,
        decay: float,
        **options: Any,
    ):
        if every < 1:
            raise UserError(f"every={every}: must be positive")
        if not 0 < decay < 1:
            raise UserError(f"decay={decay}: must be between 0 and 1")
        super().__init__(assignment, num_codes, dim, **options)
        self.sums = buffer(jnp.zeros((self.vocab_size, dim), jnp.float32), _SUMS)
        self.counts = buffer(jnp.zeros((self.vocab_size,), jnp.float32), (None,))
        self.every = every
        self.decay = decay

    def statistics(self) -> Statistics:
        """See `Head.statistics`."""
        return Statistics(self.sums[...], self.counts[...])

    def observe(
        self, h_BxTxD: jax.Array, targets_BxT: jax.Array, is_token_BxT: jax.Array
    ) -> Statistics:
        """See `Head.observe`."""
        axes = token_mesh_axes(self.rules)

        def of_all_rows(h: jax.Array, targets: jax.Array, is_token: jax.Array) -> tuple[Any, ...]:
            of_these = tuple(reassign.observe(h, targets, is_token, self.vocab_size))
            return jax.lax.psum(of_these, axes) if axes else of_these

        over_rows = per_device(of_all_rows, [HIDDEN, ROWS, ROWS], [(), ()], self.rules)
        sums, counts = over_rows(h_BxTxD, targets_BxT, is_token_BxT)
        return Statistics(constrain(sums, _SUMS, self.rules), counts)

    def adapt(self, observed: Statistics | None, step: jax.Array) -> None:
        """See `Head.adapt`."""
        assert observed is not None
        statistics = reassign.update(self.statistics(), observed, self.decay)
        assignment = self.assignment[...]
        self.sums[...], self.counts[...] = statistics
        self.assignment[...] = jax.lax.cond(
            step % self.every == 0, self._reassigned, lambda _, same: same, statistics, assignment
        )

    def _reassigned(self, statistics: Statistics, assignment_VxM: jax.Array) -> jax.Array:
        is_own_V = jnp.zeros((self.vocab_size,), bool)
        if self.has_own:
            is_own_V = is_own_V.at[self.own_tokens[...]].set(True)

        def every_device(
            sums: jax.Array, counts: jax.Array, assignment: jax.Array, is_own: jax.Array
        ) -> tuple[jax.Array]:
            codes = reassign.reassign(
                Statistics(sums, counts),
                assignment,
                self.codebooks.shape[1],
                self.form,
                min_count=_MIN_COUNT,
                directions=self.has_scale,
                is_fixed=is_own,
            )
            return (codes,)

        sums = constrain(statistics.sums, (None, None), self.rules)
        same_everywhere = per_device(every_device, [()] * 4, [()], self.rules)
        return same_everywhere(sums, statistics.counts, assignment_VxM, is_own_V)[0]
