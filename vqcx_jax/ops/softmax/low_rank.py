"""Full softmax whose V x D weights are a product of two thin matrices: z = U (A h) + b.

V R + R D weights in place of V D. A row of U is a token's vector, A h the hidden state seen by all.
"""

import jax

from vqcx_jax.ops.product import product
from vqcx_jax.ops.softmax import full


def logits(
    h: jax.Array,
    down: jax.Array,
    up: jax.Array,
    bias: jax.Array | None = None,
    *,
    cap: float | None = None,
) -> jax.Array:
    """z_v = soft_cap(up[v] . (down h)) + bias[v].

    Args:
        h: (..., D). down: (R, D). up: (V, R), all of one dtype, in which down h is kept too.
        bias: (V,) or None.
        cap: see `ops.soft_cap`; None: no cap.

    Returns:
        float32 (..., V).
    """
    return full.logits(_narrow(h, down), up, bias, cap=cap)


def nll(
    h: jax.Array,
    down: jax.Array,
    up: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
    *,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z)[target] and log Z, of z as in `logits`.

    Args:
        h, down, up, bias, cap: as in `logits`. targets: int (...), values in [0, V).

    Returns:
        nll, log_z: float32 (...).
    """
    return full.nll(_narrow(h, down), up, targets, bias, cap=cap)


def _narrow(h: jax.Array, down: jax.Array) -> jax.Array:
    return product(h, down).astype(h.dtype)
