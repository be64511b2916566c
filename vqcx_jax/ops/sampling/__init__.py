"""Tokens drawn from logits: temperature, then top-k, then top-p."""

from vqcx_jax.ops.sampling.categorical import nucleus, sample, sample_listed, top_k

__all__ = ["nucleus", "sample", "sample_listed", "top_k"]
