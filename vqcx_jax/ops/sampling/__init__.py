"""Tokens drawn from logits: temperature, then top-k, then top-p."""

from vqcx_jax.ops.sampling.categorical import (
    check_k,
    check_temperature,
    first_of_sorted,
    nucleus,
    sample,
    sample_listed,
    top_k,
)

__all__ = [
    "check_k",
    "check_temperature",
    "first_of_sorted",
    "nucleus",
    "sample",
    "sample_listed",
    "top_k",
]
