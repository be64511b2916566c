"""The sums of `softmax.full`, by JAX's own gradients: the reference, and what runs elsewhere."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.softmax import full


def summed_nll(
    h: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    counts: jax.Array,
    bias: jax.Array | None = None,
    z_loss: float | jax.Array = 0.0,
    *,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.summed_nll`."""
    nll, log_z = full.nll(h, weights, targets, bias, cap=cap)
    total = jnp.sum(nll, where=counts)
    return (
        total + z_loss * jnp.sum(jnp.square(log_z), where=counts),
        jax.lax.stop_gradient(total),
    )
