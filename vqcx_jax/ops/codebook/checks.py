"""What must hold of the arrays of a codebook, checked where shapes or values are known."""

import jax
import numpy as np

from vqcx_jax.errors import UserError


def check_codes(assignment: jax.Array | np.ndarray, num_codes: int) -> None:
    """Raises UserError unless codes are in [0, num_codes) and num_codes <= V.

    Values are looked at where they are known, which is not under jit.

    Args:
        assignment: int (V,) or (V, M).
    """
    vocab_size = assignment.shape[0]
    if num_codes > vocab_size:
        raise UserError(f"num_codes={num_codes}: must be at most the {vocab_size} tokens")
    if not np.issubdtype(assignment.dtype, np.integer):
        raise UserError(f"assignment has dtype {assignment.dtype}; it must be of integers")
    if isinstance(assignment, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    codes = np.asarray(assignment)
    wrong = codes[(codes < 0) | (codes >= num_codes)]
    if wrong.size:
        raise UserError(f"assignment holds code {wrong[0]}; codes must be in 0 .. {num_codes - 1}")


def check_per_token(name: str, x: jax.Array | None, vocab_size: int) -> None:
    """Raises UserError unless x is None or has one value a token, (vocab_size,)."""
    if x is not None and x.shape != (vocab_size,):
        raise UserError(
            f"{name} has shape {x.shape}; it must have one value a token, ({vocab_size},)"
        )
