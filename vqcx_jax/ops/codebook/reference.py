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


def two_level_log_probs(
    h: jax.Array,
    codes: jax.Array,
    gates: jax.Array,
    ranks: jax.Array,
    code_bias: jax.Array,
    bias: jax.Array,
    code_of: jax.Array,
    rank_of: jax.Array,
) -> jax.Array:
    """Log p(v | h) = log p(code of v | h) + log p(v | its code, h), see `two_level`.

    Args:
        h: (..., D). codes, gates: (K, D). ranks: (R, D). code_bias: (K,). bias: (V,).
        code_of, rank_of: int (V,).

    Returns:
        (..., V).
    """
    log_p_code = jax.nn.log_softmax(h @ codes.T + code_bias, axis=-1)
    z = h @ (gates[code_of] * ranks[rank_of]).T + bias
    same_code_VxV = code_of[:, None] == code_of
    z_of_code = jax.nn.logsumexp(jnp.where(same_code_VxV, z[..., None, :], -jnp.inf), axis=-1)
    return log_p_code[..., code_of] + z - z_of_code
