"""The formula as it reads: all V logits, then their logsumexp."""

import jax

from vqcx_jax.ops.codebook import multi


def log_z(
    code_logits: multi.CodeLogits,
    assignment: jax.Array,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
) -> jax.Array:
    """logsumexp_v of z_v = scale[v] sum_m code_logits[m][assignment[v, m]] + bias[v].

    Args:
        code_logits: M arrays (..., K_m). assignment: int (V, M). bias, scale: (V,) or None.

    Returns:
        float32 (...).
    """
    return jax.nn.logsumexp(multi.logits(code_logits, assignment, bias, scale), axis=-1)
