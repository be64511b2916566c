"""The sums of `bilinear`, by its own gradients: the reference, and what runs elsewhere."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.codebook import bilinear, multi
from vqcx_jax.ops.soft_cap import soft_cap


def summed_nll(
    h: jax.Array,
    codebooks: tuple[jax.Array, jax.Array],
    log_mass: jax.Array,
    codes: tuple[jax.Array, jax.Array],
    counts: jax.Array,
    z_loss: float | jax.Array = 0.0,
    *,
    form: multi.Form = "additive",
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.summed_nll`."""
    code_logits = tuple(soft_cap(l, cap) for l in multi.code_logits(h, codebooks, form))
    log_z = bilinear.log_z(code_logits, log_mass)
    of_targets = (multi.pick(l, code) for l, code in zip(code_logits, codes, strict=True))
    total = jnp.sum(log_z - sum(of_targets), where=counts)
    return (
        total + z_loss * jnp.sum(jnp.square(log_z), where=counts),
        jax.lax.stop_gradient(total),
    )
