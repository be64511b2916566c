"""VQ-Logits with one codebook (M = 1): logits, loss and the map from tokens to codes."""

from vqcx_jax.ops.codebook.closed_form import code_log_mass, code_logits, logits, nll

__all__ = ["code_log_mass", "code_logits", "logits", "nll"]
