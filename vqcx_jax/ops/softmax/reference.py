"""Output layers with a row per token, written as their definitions read: V probabilities."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def low_rank_logits(
    h: jax.Array,
    down: jax.Array,
    up: jax.Array,
    bias: jax.Array | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Logits of a full softmax whose weights are up @ down.

    Args:
        h: (..., D). down: (R, D). up: (V, R). bias: (V,) or None. cap: soft-cap or None.

    Returns:
        (..., V).
    """
    z = h @ (up @ down).T
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    return z if bias is None else z + bias


def adaptive_probs(
    h: jax.Array,
    head: jax.Array,
    bias: jax.Array | None,
    clusters: Sequence[tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """p(rank | h), one rank after the other: Grave et al. (2017), equation 1 and section 4.

    Args:
        h: (..., D). head, bias, clusters: as in `adaptive.AdaptiveWeights`.

    Returns:
        (..., V).
    """
    in_head = _softmax(h @ head.T + (0.0 if bias is None else bias))
    num_short = head.shape[0] - len(clusters)
    probs = [in_head[..., rank] for rank in range(num_short)]
    for i, (down, up) in enumerate(clusters):
        in_cluster = _softmax((h @ down.T) @ up.T)
        for token in range(up.shape[0]):
            probs.append(in_head[..., num_short + i] * in_cluster[..., token])
    return jnp.stack(probs, axis=-1)


def _softmax(z: jax.Array) -> jax.Array:
    e = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)
