"""Full softmax, plainly: the logits are kept."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.checks import check_per_token, check_targets
from vqcx_jax.ops.labels import nan_unless_tokens
from vqcx_jax.ops.product import product
from vqcx_jax.ops.soft_cap import soft_cap


def logits(
    h: jax.Array, weights: jax.Array, bias: jax.Array | None = None, *, cap: float | None = None
) -> jax.Array:
    """z_v = soft_cap(weights[v] . h) + bias[v].

    Args:
        h: (..., D). weights: (V, D) of the same dtype. bias: (V,) or None.
        cap: see `ops.soft_cap`; None: no cap.

    Returns:
        float32 (..., V).

    Raises:
        UserError: bias is not (V,).
    """
    check_per_token("bias", bias, weights.shape[0])
    z = soft_cap(product(h, weights), cap)
    return z if bias is None else z + bias.astype(jnp.float32)


def nll(
    h: jax.Array,
    weights: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z)[target] and log Z = logsumexp_v z_v, of z as in `logits`.

    Args:
        h: (..., D). weights: (V, D). targets: int (...), values in [0, V). bias: (V,) or None.
        cap: see `ops.soft_cap`; None: no cap.

    Returns:
        nll, log_z: float32 (...).

    Raises:
        UserError: bias is not (V,), or targets are not one for each h, or are out of range, where
            they are known (under jit their nll is NaN).
    """
    check_targets(targets, weights.shape[0], h.shape[:-1])
    z = logits(h, weights, bias, cap=cap)
    log_z = jax.nn.logsumexp(z, axis=-1)
    # A masked sum instead of a gather: V may be sharded, and no device then holds every row.
    is_target = jnp.arange(weights.shape[0]) == targets[..., None]
    nll = log_z - jnp.sum(jnp.where(is_target, z, 0.0), axis=-1)
    return nan_unless_tokens(nll, targets, weights.shape[0]), log_z
