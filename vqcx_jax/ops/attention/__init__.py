"""Attention with complex (CMHA), rotary and other positions, as pure functions.

`encode` makes queries and keys position-aware, in the forms of `rotary`, `euler`, `smooth`,
`harmonics` and `pope`; `attend` takes their softmax. `reference` holds the definitions.
"""

from vqcx_jax.ops.attention.alibi import alibi_bias, alibi_slopes
from vqcx_jax.ops.attention.contrastive import phase_contrastive_loss
from vqcx_jax.ops.attention.core import (
    attend,
    attention_weights,
    causal_mask,
    segment_mask,
    window_mask,
)
from vqcx_jax.ops.attention.cudnn import attend_by_cudnn
from vqcx_jax.ops.attention.encode import (
    amplitude_queries_and_keys,
    complex_queries_and_keys,
    harmonic_queries_and_keys,
    pope_queries_and_keys,
    rope_queries_and_keys,
    smooth_queries_and_keys,
)
from vqcx_jax.ops.attention.euler import euler_adapt
from vqcx_jax.ops.attention.extension import (
    linear_frequencies,
    ntk_frequencies,
    yarn_frequencies,
    yarn_magnitude,
)
from vqcx_jax.ops.attention.harmonics import key_harmonics, query_harmonics
from vqcx_jax.ops.attention.pope import clamp_bias, pope_frequencies
from vqcx_jax.ops.attention.qk_norm import qk_norm
from vqcx_jax.ops.attention.reference import (
    complex_scores,
    harmonic_scores,
    pope_scores,
    rope_scores,
    smooth_scores,
)
from vqcx_jax.ops.attention.rotary import (
    per_head_frequencies,
    rope_frequencies,
    rotary_table,
    rotate,
)
from vqcx_jax.ops.attention.smooth import smooth_adapt

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "amplitude_queries_and_keys",
    "attend",
    "attend_by_cudnn",
    "attention_weights",
    "causal_mask",
    "clamp_bias",
    "complex_queries_and_keys",
    "complex_scores",
    "euler_adapt",
    "harmonic_queries_and_keys",
    "harmonic_scores",
    "key_harmonics",
    "linear_frequencies",
    "ntk_frequencies",
    "per_head_frequencies",
    "phase_contrastive_loss",
    "pope_frequencies",
    "pope_queries_and_keys",
    "pope_scores",
    "qk_norm",
    "query_harmonics",
    "rope_frequencies",
    "rope_queries_and_keys",
    "rope_scores",
    "rotary_table",
    "rotate",
    "segment_mask",
    "smooth_adapt",
    "smooth_queries_and_keys",
    "smooth_scores",
    "window_mask",
    "yarn_frequencies",
    "yarn_magnitude",
]
