"""Attention with rotary or complex (CMHA) positions, as pure functions."""

from vqcx_jax.ops.attention.core import attend, causal_mask, segment_mask
from vqcx_jax.ops.attention.encode import complex_queries_and_keys, rope_queries_and_keys
from vqcx_jax.ops.attention.euler import euler_adapt
from vqcx_jax.ops.attention.reference import complex_scores
from vqcx_jax.ops.attention.rotary import rope_frequencies, rotary_table, rotate

__all__ = [
    "attend",
    "causal_mask",
    "complex_queries_and_keys",
    "complex_scores",
    "euler_adapt",
    "rope_frequencies",
    "rope_queries_and_keys",
    "rotary_table",
    "rotate",
    "segment_mask",
]
