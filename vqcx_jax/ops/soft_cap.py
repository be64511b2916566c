"""Soft-capped logits: the product of hidden state and row goes through cap * tanh(x / cap).

The cap is on the product alone; a token's bias is added after it. Tokens of one code then still
share a capped code logit, so that the closed form of VQ-Logits survives, and a full output layer
honours the same definition (Gemma Team 2024, whose output layer has no bias).
"""

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError


def check_cap(cap: float | None, name: str = "cap") -> None:
    """Raises UserError unless it is positive and finite, or None."""
    if cap is not None and not 0 < cap < float("inf"):
        raise UserError(f"{name}={cap}: must be positive and finite, or None")


def soft_cap(product: jax.Array, cap: float | None) -> jax.Array:
    """Cap * tanh(product / cap): nearly product where that is small, always within +-cap.

    Args:
        product: float32 (...). cap: positive; None: product as it is.

    Raises:
        UserError: cap is not positive.
    """
    check_cap(cap)
    return product if cap is None else cap * jnp.tanh(product / cap)
