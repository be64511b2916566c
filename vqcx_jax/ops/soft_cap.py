"""Soft-capped logits: the product of hidden state and row goes through cap * tanh(x / cap).

The cap is on the product alone; a token's bias is added after it. Tokens of one code then still
share a capped code logit, so that the closed form of VQ-Logits survives, and a full output layer
honours the same definition (Gemma Team 2024, whose output layer has no bias).
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops import codebook, softmax


def soft_cap(product: jax.Array, cap: float | None) -> jax.Array:
    """Cap * tanh(product / cap): nearly product where that is small, always within +-cap.

    Args:
        product: float32 (...). cap: positive; None: product as it is.
    """
    return product if cap is None else cap * jnp.tanh(product / cap)


def softmax_nll(
    h: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    cap: float,
) -> tuple[jax.Array, jax.Array]:
    """`ops.softmax.nll` with soft-capped products; arguments and results are the same."""
    z = soft_cap(softmax.logits(h, weights), cap)
    if bias is not None:
        z = z + bias.astype(jnp.float32)
    log_z = jax.nn.logsumexp(z, axis=-1)
    # A masked sum instead of a gather: V may be sharded, and no device then holds every row.
    is_target = jnp.arange(weights.shape[0]) == targets[..., None]
    return log_z - jnp.sum(jnp.where(is_target, z, 0.0), axis=-1), log_z


def codebook_nll(
    h: jax.Array,
    codes: jax.Array,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    cap: float,
) -> tuple[jax.Array, jax.Array]:
    """`ops.codebook.nll` with soft-capped code logits; O(K) per position as well."""
    num_codes = codes.shape[0]
    l = soft_cap(codebook.code_logits(h, codes), cap)
    log_z = jax.nn.logsumexp(l + codebook.code_log_mass(assignment, num_codes, bias), axis=-1)
    # A masked sum instead of a gather: its gradient is dense arithmetic, not a scatter.
    is_target = jnp.arange(num_codes) == assignment[targets][..., None]
    target_logit = jnp.sum(jnp.where(is_target, l, 0.0), axis=-1)
    if bias is not None:
        target_logit = target_logit + bias.astype(jnp.float32)[targets]
    return log_z - target_logit, log_z
