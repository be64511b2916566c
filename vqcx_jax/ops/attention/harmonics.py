"""A richer Adapt: a weighted sum of harmonics of the phase difference, still a dot product.

score_mn = sum_i sum_r w_r,i mu_q mu_k cos(r AS_mn,i + b_r,i + (m - n) omega_i), r = 0 .. R-1. Each
term separates into a query and a key, so that q' and k' are the R terms side by side, R times as
wide. r is an integer, so that there is no branch cut, and mu e^{i r theta} = x (x / mu)^(r-1) needs
no angle. r = 0 is Adapt without semantic phase (delta = 0), r = 1 is RoPE.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.planes import (
    Pair,
    direction,
    multiply,
    smooth_amplitude,
    to_pair,
    unit,
)


def key_harmonics(k: jax.Array, num_harmonics: int) -> jax.Array:
    """Mu e^{i r theta} for r = 0 .. R-1: the key side, which has no parameters.

    Args:
        k: (..., K, d), plane i is (k[i], k[i + d/2]).
        num_harmonics: R, at least 1.

    Returns:
        (..., K, R d) in k's dtype, R P planes, those of r = 0 first; the arithmetic is float32.

    mu is `planes.smooth_amplitude` except in r = 1, which is k itself: everything is smooth, k = 0
    included.
    """
    return _side_by_side(_powers(to_pair(k), num_harmonics)).astype(k.dtype)


def query_harmonics(q: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
    """w_r mu e^{i (r theta + b_r)} for r = 0 .. R-1: the query side.

    Args:
        q: (..., H, d).
        weights, bias: (H, R, P) or (R, P), P = d/2. They only touch queries, so they belong to
            query heads. Weights of 1 at r = 1 and 0 elsewhere, with no bias, leave q as it is.

    Returns:
        (..., H, R d) in q's dtype, laid out as `key_harmonics`.
    """
    weights = weights.astype(jnp.float32)
    cos, sin = unit(bias.astype(jnp.float32))
    real, imag = weights * cos, weights * sin
    terms = [
        multiply(power, (real[..., r, :], imag[..., r, :]))
        for r, power in enumerate(_powers(to_pair(q), weights.shape[-2]))
    ]
    return _side_by_side(terms).astype(q.dtype)


def _powers(x: Pair, num_harmonics: int) -> list[Pair]:
    amplitude, z = smooth_amplitude(x), direction(x)
    powers: list[Pair] = [(amplitude, jnp.zeros_like(amplitude)), x]
    while len(powers) < num_harmonics:
        powers.append(multiply(powers[-1], z))
    return powers[:num_harmonics]


def _side_by_side(terms: list[Pair]) -> jax.Array:
    real, imag = zip(*terms, strict=True)
    return jnp.concatenate([*real, *imag], axis=-1)
