"""PoPE: amplitudes carry content, phases carry position and nothing else.

score_mn = sum_c softplus(q_c) softplus(k_c) cos((m - n) theta_c + delta_c) over all d coordinates,
each with a frequency of its own (Gopalakrishnan et al. 2025, "Decoupling the what and where with
polar coordinate positional embeddings"). As a dot product it is 2d wide.

Public implementations turn keys by delta where we turn queries: their delta is ours with the
opposite sign, which is the same family of models, as delta may be anything from -2 pi to 0.
"""

import math

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.rotary import rope_frequencies

MIN_BIAS = -2.0 * math.pi


def pope_frequencies(head_dim: int, base: float = 10_000.0) -> jax.Array:
    """theta_c = base^(-c/head_dim) for c < head_dim, float32 (d,), in radians per position."""
    return rope_frequencies(2 * head_dim, base)


def pope_amplitude(x: jax.Array) -> jax.Array:
    """softplus(x) = log(1 + e^x), float32."""
    return jax.nn.softplus(x.astype(jnp.float32))


def clamp_bias(bias: jax.Array) -> jax.Array:
    """Clip(bias, -2 pi, 0), with the gradient of the identity.

    The gradient of a plain clip is 0 outside: a bias that one step had carried over the edge would
    never come back. Zeros, the usual start, are on the edge.
    """
    bias = bias.astype(jnp.float32)
    return bias + jax.lax.stop_gradient(jnp.clip(bias, MIN_BIAS, 0.0) - bias)
