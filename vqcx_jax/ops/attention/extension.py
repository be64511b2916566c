"""Longer contexts than a model was trained on, by changed frequencies.

Each function takes the frequencies of training, (..., P) in radians per position, ordered from the
highest to the lowest, and the factor by which the context grows.
"""

import math

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError


def linear_frequencies(frequencies: jax.Array, factor: float) -> jax.Array:
    """Omega / factor: positions squeezed into those of training (Chen et al. 2023).

    Raises:
        UserError: factor is below 1.
    """
    _check_factor(factor)
    return frequencies / factor


def ntk_frequencies(frequencies: jax.Array, factor: float) -> jax.Array:
    """RoPE's base times factor^(d/(d-2)): omega_i factor^(-i/(P-1)), P that turn ("NTK-aware").

    The highest frequency stays and the lowest that is not 0 is divided by factor.

    Raises:
        UserError: factor is below 1.
    """
    _check_factor(factor)
    num_turning = jnp.sum(frequencies != 0, axis=-1, keepdims=True)
    plane = jnp.arange(frequencies.shape[-1], dtype=jnp.float32)
    share = plane / jnp.maximum(num_turning - 1, 1)
    return frequencies * factor**-share


def yarn_frequencies(
    frequencies: jax.Array,
    factor: float,
    original_length: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> jax.Array:
    """Omega for fast planes, omega / factor for slow ones, between them a blend (Peng et al. 2023).

    A plane is as fast as its number of turns within the original context,
    r = original_length * omega / (2 pi). It keeps the share
    gamma = clip((r - beta_slow) / (beta_fast - beta_slow), 0, 1) of its own frequency:
    (1 - gamma) omega / factor + gamma omega. This is the paper's formula; its published code lets
    gamma fall linearly with the index of the plane instead, between the two that turn beta_fast
    and beta_slow times. `yarn_magnitude` belongs to it.

    Args:
        frequencies: (..., P).
        factor: the new length over original_length.
        original_length: positions of training.
        beta_fast, beta_slow: turns from which a plane is kept, and up to which it is squeezed.

    Raises:
        UserError: factor is below 1, or beta_fast is not above beta_slow.
    """
    _check_factor(factor)
    if beta_fast <= beta_slow:
        raise UserError(f"beta_fast={beta_fast}: must be above beta_slow={beta_slow}")
    turns = original_length * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - beta_slow) / (beta_fast - beta_slow), 0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies


def yarn_magnitude(factor: float) -> float:
    """0.1 ln(factor) + 1, by which YaRN multiplies queries and keys, each.

    The paper divides scores by a temperature t, with sqrt(1/t) = 0.1 ln(factor) + 1. Scores are
    therefore multiplied by the square of this: multiply cos and sin by it, or the scale of
    attention by its square.

    Raises:
        UserError: factor is below 1.
    """
    _check_factor(factor)
    return 0.1 * math.log(factor) + 1.0


def _check_factor(factor: float) -> None:
    if factor < 1.0:
        raise UserError(f"factor={factor}: must be at least 1")
