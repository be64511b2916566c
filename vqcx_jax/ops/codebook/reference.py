"""VQ-Logits written as the definition reads: scatter code logits to V logits, then softmax."""

from collections.abc import Sequence

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
    return nll_of_logits(logits(h, codes, assignment, bias), targets)


def additive_logits(
    h: jax.Array,
    codebooks: Sequence[jax.Array],
    assignment: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """z_v = sum_m codebooks[m][assignment[v, m]] . h + bias[v].

    Args:
        h: (..., D). codebooks: M arrays (K_m, D). assignment: int (V, M), column m in [0, K_m).
        bias: (V,) or None.

    Returns:
        (..., V).
    """
    vectors = jnp.sum(
        jnp.stack([codes[assignment[:, m]] for m, codes in enumerate(codebooks)]), axis=0
    )
    z = h @ vectors.T
    return z if bias is None else z + bias


def product_logits(
    h: jax.Array,
    codebooks: Sequence[jax.Array],
    assignment: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """z_v = concatenate_m(codebooks[m][assignment[v, m]]) . h + bias[v].

    Args:
        codebooks: M arrays (K_m, D_m), the D_m adding up to D. Others as in `additive_logits`.
    """
    vectors = jnp.concatenate(
        [codes[assignment[:, m]] for m, codes in enumerate(codebooks)], axis=-1
    )
    z = h @ vectors.T
    return z if bias is None else z + bias


def nll_of_logits(z: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log softmax(z)[target] and log Z = logsumexp_v z_v for z (..., V) and targets int (...)."""
    log_z = jax.nn.logsumexp(z, axis=-1)
    return log_z - jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0], log_z


def class_log_probs(
    h: jax.Array,
    codebooks: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    class_of: jax.Array,
) -> jax.Array:
    """Log p(v | h), p(v | h) = p(class of v | h) p(v | its class, h) unless v is frequent.

    See `classes`. Every vector is written out, and every class is summed over the vocabulary.

    Args:
        h: (..., D). codebooks: (M, K, D / M). codes: int (V + C, M). scale, bias: (V + C,).
        class_of: int (V,); -1: frequent.

    Returns:
        (..., V).
    """
    vocab_size = len(class_of)
    rows = [codebook[codes[:, m]] for m, codebook in enumerate(codebooks)]
    z = h @ (scale[:, None] * jnp.concatenate(rows, axis=-1)).T + bias
    is_frequent = class_of < 0
    is_entry = jnp.concatenate([is_frequent, jnp.ones(len(codes) - vocab_size, bool)])
    log_z = jax.nn.logsumexp(jnp.where(is_entry, z, -jnp.inf), axis=-1, keepdims=True)
    of_token = z[..., :vocab_size]
    same_class_VxV = class_of[:, None] == class_of
    z_of_class = jax.nn.logsumexp(
        jnp.where(same_class_VxV, of_token[..., None, :], -jnp.inf), axis=-1
    )
    of_class = z[..., vocab_size + jnp.maximum(class_of, 0)]
    return jnp.where(is_frequent, of_token, of_class + of_token - z_of_class) - log_z
