"""Blocks of the vocabulary: rows of weights whose logits are held at a time.

Logits of a block are (C, N), the positions of a token side by side: sums and maxima over tokens
then add whole rows. What V leaves over of the blocks is a smaller block, so that nothing is padded.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

# On CPU within 8% of the fastest block at every shape tried (N 128 to 4096), with about half the
# memory of the next larger one. See benchmarks/output_layer.py.
VOCAB_BLOCK = 1024

_Carry = TypeVar("_Carry")


def fold_blocks(
    step: Callable[[_Carry, jax.Array, int], _Carry], carry: _Carry, vocab_size: int, size: int
) -> _Carry:
    """Carry = step(carry, start, size) over whole blocks, then over what they leave.

    Args:
        size: of a block; may exceed vocab_size.
    """
    size = min(size, vocab_size)
    num_blocks, rest = divmod(vocab_size, size)
    carry = jax.lax.fori_loop(0, num_blocks, lambda b, c: step(c, b * size, size), carry)
    return step(carry, jnp.asarray(vocab_size - rest), rest) if rest else carry


def products(h_NxD: jax.Array, weights_CxD: jax.Array) -> jax.Array:
    """Weights . h, float32 (C, N)."""
    return dot("cd,nd->cn", weights_CxD, h_NxD)


def with_bias(z_CxN: jax.Array, bias_V: jax.Array | None, start: jax.Array) -> jax.Array:
    """Adds the bias of the rows from start on."""
    if bias_V is None:
        return z_CxN
    return z_CxN + read(bias_V, start, z_CxN.shape[0]).astype(jnp.float32)[:, None]


def is_target(targets_N: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Where a block's rows are the targets, bool (C, N)."""
    return (start + jnp.arange(size))[:, None] == targets_N


def dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Einsum, accumulated in float32."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def read(rows: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Rows from start on, size of them."""
    return jax.lax.dynamic_slice_in_dim(rows, start, size)


def write(rows: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    """Rows with those from start on replaced by block, in the dtype of rows."""
    return jax.lax.dynamic_update_slice_in_dim(rows, block.astype(rows.dtype), start, axis=0)


class Scores(NamedTuple):
    """What a loss needs of the logits seen so far: float32 (N,) each.

    Z is kept as its two parts, because exp(z - log Z) would lose the digits of a large log Z.

    Attributes:
        peak: the largest logit. total: sum of exp(z - peak), which is at least 1 unless every
            logit is -inf. target: the target's logit, 0 before it was seen.
    """

    peak: jax.Array
    total: jax.Array
    target: jax.Array

    @classmethod
    def of_nothing(cls, h_NxD: jax.Array) -> "Scores":
        """Before any logit of N positions."""
        zeros_N = jnp.zeros_like(h_NxD[:, 0], jnp.float32)
        # A finite start: where every bias so far is -inf, there is no -inf - -inf.
        return cls(zeros_N + jnp.finfo(jnp.float32).min, zeros_N, zeros_N)

    def add(self, z_CxN: jax.Array, is_target_CxN: jax.Array) -> "Scores":
        """With C more logits of each position."""
        peak_N = jnp.maximum(self.peak, jnp.max(z_CxN, axis=0))
        total_N = self.total * jnp.exp(self.peak - peak_N)
        total_N = total_N + jnp.sum(jnp.exp(z_CxN - peak_N), axis=0)
        target_N = self.target + jnp.sum(jnp.where(is_target_CxN, z_CxN, 0.0), axis=0)
        return Scores(peak_N, total_N, target_N)

    def over(self, mesh_axes: tuple[str, ...]) -> "Scores":
        """Of all rows, where those of the mesh axes' devices were seen by each alone."""
        if not mesh_axes:
            return self
        peak_N = jax.lax.pmax(self.peak, mesh_axes)
        total_N = self.total * jnp.exp(self.peak - peak_N)
        return Scores(peak_N, *jax.lax.psum((total_N, self.target), mesh_axes))

    def log_z(self) -> jax.Array:
        """Log Z, float32 (N,)."""
        return self.peak + jnp.log(self.total)
