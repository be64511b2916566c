"""What must hold of the codes of a vocabulary, checked where shapes or values are known."""

from collections.abc import Sequence

import jax
import numpy as np

from vqcx_jax.errors import UserError
from vqcx_jax.ops.checks import are_known


def check_codes(
    assignment: jax.Array | np.ndarray,
    num_codes: int | Sequence[int],
    vocab_size: int | None = None,
) -> None:
    """Raises UserError unless codes are in [0, num_codes) and num_codes <= V.

    Values are looked at where they are known, which is not under jit.

    Args:
        assignment: int (V,), or (V, M) where num_codes are those of M codebooks, or of each.
        vocab_size: V; None: as many as assignment has rows.
    """
    vocab_size = assignment.shape[0] if vocab_size is None else vocab_size
    most = int(np.max(num_codes))
    if most > vocab_size:
        raise UserError(f"num_codes={most}: must be at most the {vocab_size} tokens")
    if not np.issubdtype(assignment.dtype, np.integer):
        raise UserError(f"assignment has dtype {assignment.dtype}; it must be of integers")
    if not are_known(assignment):
        return
    codes = np.asarray(assignment)
    limits = np.broadcast_to(np.asarray(num_codes), codes.shape)
    is_wrong = (codes < 0) | (codes >= limits)
    if np.any(is_wrong):
        code, limit = codes[is_wrong][0], limits[is_wrong][0]
        raise UserError(f"assignment holds code {code}; codes must be in 0 .. {limit - 1}")


def check_own_tokens(own_tokens: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Raises UserError unless they are 1 .. V - 1 distinct integers in [0, V), (T,)."""
    if own_tokens.ndim != 1 or len(own_tokens) == 0:
        raise UserError(f"own_tokens have shape {own_tokens.shape}; they must be one or more, (T,)")
    if not np.issubdtype(own_tokens.dtype, np.integer):
        raise UserError(f"own_tokens have dtype {own_tokens.dtype}; they must be integers")
    if len(own_tokens) >= vocab_size:
        raise UserError(
            f"own_tokens are {len(own_tokens)}; they must be fewer than the {vocab_size} tokens"
        )
    if not are_known(own_tokens):
        return
    tokens, counts = np.unique(np.asarray(own_tokens), return_counts=True)
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size) | (counts > 1)]
    if wrong.size:
        raise UserError(
            f"own_tokens hold {wrong[0]}; they must be different ones in 0 .. {vocab_size - 1}"
        )
