"""VQ-Logits: code logits, token logits and losses of one codebook or several.

One codebook (M = 1) is `code_logits`, `code_log_mass`, `logits` and `nll`. Several are `multi`
(code logits and token logits) and one of two losses: `bilinear` (M = 2) or `streaming` (any M).
"""

from vqcx_jax.ops.codebook import bilinear, multi, streaming
from vqcx_jax.ops.codebook.closed_form import code_log_mass, code_logits, logits, nll

__all__ = ["bilinear", "code_log_mass", "code_logits", "logits", "multi", "nll", "streaming"]
