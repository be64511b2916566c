"""The score functions, written as their definitions read. The oracles.

All return (B, H, T, S), unscaled and unmasked, for q (B, T, H, d) and k (B, S, H, d) with as many
heads, P = d/2 planes, frequencies omega (P,) or (H, P) in radians per position, q_positions (B, T)
and k_positions (B, S). They hold a (B, H, T, S, P) array and take any dtype: for tests, at small
sizes. AS_mn is the difference of the phases of query m and key n, Delta(P_mn)_i = (m - n) omega_i.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.planes import EPSILON


def rope_scores(
    q: jax.Array,
    k: jax.Array,
    frequencies: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
) -> jax.Array:
    """score_mn = Re sum_i q_m,i conj(k_n,i) exp(i Delta(P_mn)_i) (Su et al. 2021)."""
    (q_real, q_imag), (k_real, k_imag) = _queries(q), _keys(k)
    angle = _relative(frequencies, q_positions, k_positions)
    real = q_real * k_real + q_imag * k_imag
    imag = q_imag * k_real - q_real * k_imag
    return jnp.sum(real * jnp.cos(angle) - imag * jnp.sin(angle), axis=-1)


def complex_scores(
    q: jax.Array,
    k: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
    frequencies: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
) -> jax.Array:
    """score_mn = sum_i mu_q,i mu_k,i cos(Adapt(AS_mn)_i + Delta(P_mn)_i).

    Adapt(AS)_i = delta_i AS_i + b_i (ComplexFormer, after EulerFormer, Tian et al. 2024). delta
    and bias are (H, P) or (P,).
    """
    (q_radius, q_phase), (k_radius, k_phase) = _polar(*_queries(q)), _polar(*_keys(k))
    adapt = _per_head(delta) * (q_phase - k_phase) + _per_head(bias)
    angle = adapt + _relative(frequencies, q_positions, k_positions)
    return jnp.sum(q_radius * k_radius * jnp.cos(angle), axis=-1)


def smooth_scores(
    q: jax.Array,
    k: jax.Array,
    a: jax.Array,
    bias: jax.Array,
    frequencies: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
) -> jax.Array:
    """score_mn = sum_i mu_q,i mu_k,i cos(phi(q_m,i) - phi(k_n,i) + b_i + Delta(P_mn)_i).

    phi = theta + 2 arg(1 - alpha rho e^{-i theta}) with alpha = a / sqrt(1 + |a|^2) and
    rho = mu / sqrt(mu^2 + EPSILON^2). a is (H, d) or (d,), bias (H, P) or (P,).
    """
    a_real, a_imag = (_per_head(part) for part in jnp.split(a, 2, axis=-1))
    length = jnp.sqrt(1 + a_real**2 + a_imag**2)

    def bent(radius: jax.Array, phase: jax.Array) -> jax.Array:
        rho = radius / jnp.sqrt(radius**2 + EPSILON**2)
        real = 1 - rho / length * (a_real * jnp.cos(phase) + a_imag * jnp.sin(phase))
        imag = -rho / length * (a_imag * jnp.cos(phase) - a_real * jnp.sin(phase))
        return phase + 2 * jnp.arctan2(imag, real)

    q_polar, k_polar = _polar(*_queries(q)), _polar(*_keys(k))
    angle = bent(*q_polar) - bent(*k_polar) + _per_head(bias)
    angle = angle + _relative(frequencies, q_positions, k_positions)
    return jnp.sum(q_polar[0] * k_polar[0] * jnp.cos(angle), axis=-1)


def harmonic_scores(
    q: jax.Array,
    k: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
    frequencies: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
) -> jax.Array:
    """score_mn = sum_i sum_r w_r,i mu_q,r,i mu_k,r,i cos(r AS_mn,i + b_r,i + Delta(P_mn)_i).

    r = 0 .. R-1; weights and bias are (H, R, P) or (R, P).
    mu_r = mu^r / (mu^2 + EPSILON^2)^((r-1)/2), which is mu for EPSILON = 0.
    """
    (q_radius, q_phase), (k_radius, k_phase) = _polar(*_queries(q)), _polar(*_keys(k))
    relative = _relative(frequencies, q_positions, k_positions)
    product = q_radius * k_radius
    smooth_product = jnp.sqrt((q_radius**2 + EPSILON**2) * (k_radius**2 + EPSILON**2))
    score = jnp.zeros(())
    for r in range(weights.shape[-2]):
        amplitude = product**r * smooth_product ** (1 - r)
        angle = r * (q_phase - k_phase) + _per_head(bias[..., r, :]) + relative
        score = score + _per_head(weights[..., r, :]) * amplitude * jnp.cos(angle)
    return jnp.sum(score, axis=-1)


def pope_scores(
    q: jax.Array,
    k: jax.Array,
    bias: jax.Array,
    frequencies: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
) -> jax.Array:
    """score_mn = sum_c softplus(q_m,c) softplus(k_n,c) cos((m - n) theta_c + delta_c).

    Over all d coordinates, with d frequencies theta; bias is delta, (H, d) or (d,), in [-2 pi, 0]
    (Gopalakrishnan et al. 2025).
    """
    q_amplitude = jnp.moveaxis(jnp.log1p(jnp.exp(q)), 1, 2)[:, :, :, None]
    k_amplitude = jnp.moveaxis(jnp.log1p(jnp.exp(k)), 1, 2)[:, :, None]
    angle = _relative(frequencies, q_positions, k_positions) + _per_head(bias)
    return jnp.sum(q_amplitude * k_amplitude * jnp.cos(angle), axis=-1)


def _queries(q: jax.Array) -> tuple[jax.Array, ...]:
    """Real and imaginary parts, (B, H, T, 1, P)."""
    return tuple(jnp.split(jnp.moveaxis(q, 1, 2)[:, :, :, None], 2, axis=-1))


def _keys(k: jax.Array) -> tuple[jax.Array, ...]:
    """Real and imaginary parts, (B, H, 1, S, P)."""
    return tuple(jnp.split(jnp.moveaxis(k, 1, 2)[:, :, None], 2, axis=-1))


def _polar(real: jax.Array, imag: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sqrt(real**2 + imag**2), jnp.arctan2(imag, real)


def _per_head(x: jax.Array) -> jax.Array:
    """(H, P) to (H, 1, 1, P); (P,) stays."""
    return x if x.ndim == 1 else x[:, None, None]


def _relative(frequencies: jax.Array, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    distance = q_positions[:, None, :, None, None] - k_positions[:, None, None, :, None]
    return distance * _per_head(frequencies)
