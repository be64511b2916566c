"""The Euler transformation and Adapt of complex multi-head attention, separated per token.

Adapt(theta_q - theta_k) = delta (theta_q - theta_k) + b is linear, so the score
Re sum mu_q mu_k exp(i (Adapt + Delta)) is the dot product of q' = mu_q exp(i(delta theta_q + b))
and k' = mu_k exp(i delta theta_k), once both are rotated by their positions. `euler_adapt` makes
q' or k' out of raw q or k; `reference.complex_scores` is the formula that it must reproduce.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.planes import from_pair, to_pair
from vqcx_jax.ops.attention.trig import arctan2, cos_sin


def euler_adapt(x: jax.Array, delta: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Mu exp(i (delta theta + bias)) for every plane, with mu, theta the polar form of the plane.

    Args:
        x: (..., H, d) queries or keys; plane i is (x[i], x[i + d/2]).
        delta: (H, P), P = d/2; or (P,), shared by the heads, or (1,), by all planes, too, as in
            EulerFormer.
        bias: (H, P), (P,) or (1,), in radians, or None for zero (keys).

    Returns:
        (..., H, d) in x's dtype; the arithmetic is float32.

    Values and gradients are finite everywhere, x = 0 included, where theta is taken to be 0 (there
    are no second derivatives there).
    For non-integer delta the function jumps where theta crosses +-pi (the published form has it;
    `smooth` and `harmonics` have not).
    """
    delta = delta.astype(jnp.float32)
    bias = jnp.zeros_like(delta) if bias is None else bias.astype(jnp.float32)
    return from_pair(_polar_power(*to_pair(x), delta, bias)).astype(x.dtype)


@jax.custom_jvp
def _polar_power(
    real: jax.Array, imag: jax.Array, delta: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    cos_phi, sin_phi = cos_sin(delta * arctan2(imag, real) + bias)
    radius = jnp.hypot(real, imag)
    return radius * cos_phi, radius * sin_phi


@_polar_power.defjvp
def _polar_power_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    # d(mu e^{i phi}) = e^{i phi} (d mu + i mu d phi). Both d mu = cos(theta) dr + sin(theta) dp and
    # mu d theta = cos(theta) dp - sin(theta) dr are bounded, although d theta alone grows as 1/mu:
    # written this way nothing is divided by mu, and the gradient at 0 is finite.
    real, imag, delta, bias = primals
    d_real, d_imag, d_delta, d_bias = tangents
    radius, theta = jnp.hypot(real, imag), arctan2(imag, real)
    # Where theta is 0 for lack of a phase (see `arctan2`), cos(theta) is 1 and sin(theta) is 0.
    is_tiny = jnp.maximum(jnp.abs(real), jnp.abs(imag)) < 1e-37
    divisor = jnp.where(is_tiny, 1.0, radius)
    cos_theta = jnp.where(is_tiny, 1.0, real / divisor)
    sin_theta = jnp.where(is_tiny, 0.0, imag / divisor)
    cos_phi, sin_phi = cos_sin(delta * theta + bias)
    along = cos_theta * d_real + sin_theta * d_imag
    across = (
        delta * (cos_theta * d_imag - sin_theta * d_real)
        + radius * theta * d_delta
        + radius * d_bias
    )
    out = radius * cos_phi, radius * sin_phi
    return out, (cos_phi * along - sin_phi * across, sin_phi * along + cos_phi * across)
