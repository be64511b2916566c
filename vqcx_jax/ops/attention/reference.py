"""The scores of complex multi-head attention, written as the definition reads. The oracle."""

import jax
import jax.numpy as jnp


def complex_scores(
    q: jax.Array,
    k: jax.Array,
    delta: jax.Array,
    bias: jax.Array,
    frequencies: jax.Array,
    q_positions: jax.Array,
    k_positions: jax.Array,
) -> jax.Array:
    """score_mn = sum_i mu_q,i mu_k,i cos(Adapt(AS_mn)_i + Delta(P_mn)_i), unscaled and unmasked.

    AS_mn is the difference of the phases of query m and key n, Adapt(AS)_i = delta_i AS_i + b_i,
    Delta(P_mn)_i = (m - n) omega_i (ComplexFormer, after EulerFormer, Tian et al. 2024).

    Args:
        q: (B, T, H, d). k: (B, S, H, d), as many heads as q.
        delta, bias: (H, P), P = d/2.
        frequencies: (P,) omega, radians per position.
        q_positions: (B, T). k_positions: (B, S).

    Returns:
        (B, H, T, S). Holds a (B, H, T, S, P) array: for tests, at small sizes.
    """
    q_real, q_imag = jnp.split(q, 2, axis=-1)
    k_real, k_imag = jnp.split(k, 2, axis=-1)
    amplitude = jnp.einsum(
        "bthp,bshp->bhtsp",
        jnp.sqrt(q_real**2 + q_imag**2),
        jnp.sqrt(k_real**2 + k_imag**2),
    )
    q_phase = jnp.moveaxis(jnp.arctan2(q_imag, q_real), 1, 2)[:, :, :, None]
    k_phase = jnp.moveaxis(jnp.arctan2(k_imag, k_real), 1, 2)[:, :, None]
    adapt = delta[:, None, None] * (q_phase - k_phase) + bias[:, None, None]
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    relative = distance[:, None, :, :, None] * frequencies
    return jnp.sum(amplitude * jnp.cos(adapt + relative), axis=-1)
