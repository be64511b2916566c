"""Hierarchical softmax on a binary tree (Mikolov et al. 2013): a sigmoid at each step of a path.

An inner node leads to its first child with probability sigmoid(nodes[n] . h + bias[n]) and to its
second with what is left. Frequent tokens have short paths in a Huffman tree; here all are padded to
one length, see `trees.huffman_paths`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.errors import UserError
from vqcx_jax.ops.checks import are_known, check_range, check_targets
from vqcx_jax.ops.labels import nan_unless_tokens
from vqcx_jax.ops.product import product
from vqcx_jax.ops.softmax.full import logits
from vqcx_jax.ops.varying import varying_like


def nll(
    h: jax.Array,
    nodes: jax.Array,
    paths: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """-log p(target | h), O(log V) per position.

    Args:
        h: (..., D). nodes: (V - 1, D). Its gradient is summed in its dtype, float32 for that
            reason; products are of the dtype of h. bias: (V - 1,) or None.
        paths: int (V, L), see `trees.huffman_paths`. targets: int (...), values in [0, V).

    Returns:
        float32 (...).

    Raises:
        UserError: targets are not one for each h; where they are known, targets out of range (under
            jit their nll is NaN).
    """
    check_targets(targets, paths.shape[0], h.shape[:-1])
    step_NxL = paths[targets.reshape(-1)]
    node_NxL, sign_NxL = _decode(step_NxL)
    rows_NxLxD = varying_like(nodes, h)[node_NxL].astype(h.dtype)
    z_NxL = jax.vmap(product)(h.reshape(-1, h.shape[-1]), rows_NxLxD)
    if bias is not None:
        z_NxL = z_NxL + bias[node_NxL]
    step_nll_NxL = jnp.where(step_NxL > 0, jax.nn.softplus(-sign_NxL * z_NxL), 0.0)
    nll = jnp.sum(step_nll_NxL, axis=-1).reshape(targets.shape)
    return nan_unless_tokens(nll, targets, paths.shape[0])


def log_probs(
    h: jax.Array, nodes: jax.Array, paths: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Log p of every token, O(V L) per position.

    Args:
        h: (..., D). Others as in `nll`.

    Returns:
        float32 (..., V).
    """
    z = logits(h, nodes.astype(h.dtype), bias)

    def log_p_of_step(i: jax.Array | int) -> jax.Array:
        node, sign = _decode(paths[:, i])
        return jnp.where(paths[:, i] > 0, jax.nn.log_sigmoid(sign * z[..., node]), 0.0)

    # A step after the other: (..., V, L) would be too much.
    return jax.lax.fori_loop(
        1, paths.shape[1], lambda i, total: total + log_p_of_step(i), log_p_of_step(0)
    )


def check_paths(paths: jax.Array | np.ndarray) -> None:
    """Raises UserError unless paths are (V, L) and, where they are known, those of a tree."""
    if paths.ndim != 2:
        raise UserError(f"paths have shape {paths.shape}; they must be (V, L)")
    check_range("paths", paths, 2 * paths.shape[0] - 1)
    if not are_known(paths):
        return
    # In a tree alone all tokens together have the probability 1 whatever is decided.
    first = np.random.default_rng(0).uniform(0.2, 0.8, max(paths.shape[0] - 1, 1))
    log_p = np.concatenate([[0.0], np.log(np.stack([first, 1 - first], axis=1)).ravel()])
    total = np.exp(log_p[np.asarray(paths)].sum(axis=1)).sum()
    if abs(total - 1) > 1e-6:
        raise UserError(
            f"paths: are of no tree, the probabilities of all {paths.shape[0]} tokens add up to "
            f"{total:.3g}; they must be as huffman_paths makes them"
        )


def _decode(step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inner node of a step (0 if it is none), and 1.0 for the first child, -1.0 for the second."""
    node = jnp.maximum(step - 1, 0) // 2
    return node, jnp.where(step % 2 == 1, 1.0, -1.0)
