"""Hierarchies written as their definitions read: V probabilities, one token after the other."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def two_level_probs(
    h: jax.Array,
    classes: jax.Array,
    tokens: Sequence[jax.Array],
    class_bias: jax.Array | None = None,
    token_bias: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """p(class | h) p(token | class, h) of all tokens, class after class.

    Args:
        h: (..., D). classes: (C, D). tokens: C arrays (size, D).
        class_bias: (C,) or None. token_bias: C arrays (size,) or None.

    Returns:
        (..., V).
    """
    in_classes = _softmax(h @ classes.T + (0.0 if class_bias is None else class_bias))
    probs = []
    for c, rows in enumerate(tokens):
        in_class = _softmax(h @ rows.T + (0.0 if token_bias is None else token_bias[c]))
        probs.append(in_classes[..., c, None] * in_class)
    return jnp.concatenate(probs, axis=-1)


def tree_probs(
    h: jax.Array,
    nodes: jax.Array,
    children: Sequence[tuple[int, int]],
    bias: jax.Array | None = None,
) -> jax.Array:
    """A product of sigmoids for every leaf of a binary tree, from the root down.

    Args:
        h: (..., D). nodes: (V - 1, D). bias: (V - 1,) or None.
        children: of each inner node, two of: a leaf v in [0, V), or V + an inner node. The last
            inner node is the root.

    Returns:
        (..., V).
    """
    num_leaves = len(children) + 1
    z = h @ nodes.T + (0.0 if bias is None else bias)
    left = 1.0 / (1.0 + jnp.exp(-z))
    probs: dict[int, jax.Array] = {2 * num_leaves - 2: jnp.ones_like(z[..., 0])}
    for node in reversed(range(len(children))):
        first, second = children[node]
        probs[first] = probs[num_leaves + node] * left[..., node]
        probs[second] = probs[num_leaves + node] * (1.0 - left[..., node])
    return jnp.stack([probs[leaf] for leaf in range(num_leaves)], axis=-1)


def _softmax(z: jax.Array) -> jax.Array:
    e = jnp.exp(z - jnp.max(z, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)
