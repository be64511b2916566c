"""Tokens drawn from logits: temperature, then top-k, then top-p."""

from vqcx_jax.ops.sampling.categorical import (
    check_k,
    check_temperature,
    check_top_p,
    divisor,
    first_of_sorted,
    sample,
    sample_listed,
    top_k,
)
from vqcx_jax.ops.sampling.draw import draw
from vqcx_jax.ops.sampling.nucleus import nucleus

__all__ = [
    "check_k",
    "check_temperature",
    "check_top_p",
    "divisor",
    "draw",
    "first_of_sorted",
    "nucleus",
    "sample",
    "sample_listed",
    "top_k",
]
