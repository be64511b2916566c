"""VQ-Logits written as the definition reads: scatter code logits to V logits, then softmax."""

import jax
import jax.numpy as jnp


def logits(
    h: jax.Array, codes: jax.Array, assignment: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """z_v = codes[assignment[v]] . h + bias[v].

    Args:
        h: (..., D). codes: (K, D). assignment: int (V,), values in [0, K). bias: (V,) or None.

    Returns:
        (..., V).
    """
    z = h @ codes[assignment].T
    return z if bias is None else z + bias


def nll(
    h: jax.Array,
    codes: jax.Array,
    assignment: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z)[target] and log Z = logsumexp_v z_v, both (...); targets: int (...)."""
    z = logits(h, codes, assignment, bias)
    log_z = jax.nn.logsumexp(z, axis=-1)
    return log_z - jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0], log_z
