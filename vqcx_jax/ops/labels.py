"""Target labels: which of them count, and what becomes of those that are no token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from vqcx_jax.errors import UserError
from vqcx_jax.ops.checks import are_known

# The label of a position that has no loss (PyTorch's and Hugging Face's convention).
IGNORE_ID = -100


class Labels(NamedTuple):
    """Labels that are safe to index with.

    Attributes:
        tokens: int (...), values in [0, V); 0 where the label is none.
        is_ignored, is_invalid: bool (...).
    """

    tokens: jax.Array
    is_ignored: jax.Array
    is_invalid: jax.Array

    def mask(self, x: jax.Array) -> jax.Array:
        """X (...) of the labels: 0 where they are ignored, NaN where they are invalid."""
        return jnp.where(self.is_ignored, 0.0, jnp.where(self.is_invalid, jnp.nan, x))


def check_labels(labels: jax.Array, vocab_size: int) -> Labels:
    """Separates labels in [0, vocab_size) from `IGNORE_ID` and from mistakes.

    A mistake is an error at once where values are known. Under jit it is one for
    `jax.experimental.checkify`; without that, the loss of the position is NaN and never silent.

    Args:
        labels: int (...).

    Raises:
        UserError: labels are no integers; or a label is neither in [0, vocab_size) nor IGNORE_ID
            (outside of jit).
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(f"labels have dtype {labels.dtype}; they must be integers")
    labels = _widened(labels)
    is_ignored = labels == IGNORE_ID
    is_invalid = ~_are_tokens(labels, vocab_size) & ~is_ignored
    accepted = f"labels must be in 0 .. {vocab_size - 1}, or {IGNORE_ID} to be ignored"
    if not are_known(is_invalid):
        checkify.debug_check(~jnp.any(is_invalid), accepted)
    elif np.any(is_invalid):
        wrong = np.asarray(labels)[np.asarray(is_invalid)][0]
        raise UserError(f"labels hold {wrong}: {accepted}")
    return Labels(jnp.where(is_ignored | is_invalid, 0, labels), is_ignored, is_invalid)


def nan_unless_tokens(nll: jax.Array, targets: jax.Array, vocab_size: int) -> jax.Array:
    """Losses (...), NaN where the target (...) is not in [0, vocab_size).

    For operations, which take no IGNORE_ID and see values of targets in this way alone under jit.
    """
    return jnp.where(_are_tokens(targets, vocab_size), nll, jnp.nan)


def nan_if_counted(targets: jax.Array, counts: jax.Array, vocab_size: int) -> jax.Array:
    """NaN if a target that counts is not in [0, vocab_size), else 0: for sums of losses.

    Args:
        targets: int (...). counts: bool (...).

    Returns:
        float32 ().
    """
    is_wrong = counts & ~_are_tokens(targets, vocab_size)
    return jnp.where(jnp.any(is_wrong), jnp.nan, jnp.float32(0.0))


def _are_tokens(targets: jax.Array, vocab_size: int) -> jax.Array:
    targets = _widened(targets)
    return (targets >= 0) & (targets < vocab_size)


def _widened(labels: jax.Array) -> jax.Array:
    """Narrow integers would wrap what they are compared with."""
    return labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
