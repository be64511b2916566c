"""VQ-Logits: code logits, token logits and losses of one codebook or several.

One codebook (M = 1) is `code_logits`, `code_log_mass`, `logits`, `nll` and `summed_nll`. Several
are `multi` (code logits) and `loss`, which takes the cheapest exact path: `bilinear` (M = 2) or
`streaming`.
"""

from vqcx_jax.ops.codebook import bilinear, loss, multi, streaming
from vqcx_jax.ops.codebook.checks import check_codes
from vqcx_jax.ops.codebook.closed_form import code_log_mass, code_logits, logits, nll, summed_nll

__all__ = [
    "bilinear",
    "check_codes",
    "code_log_mass",
    "code_logits",
    "logits",
    "loss",
    "multi",
    "nll",
    "streaming",
    "summed_nll",
]
