"""A smooth Adapt: phases through a Moebius map of the circle, without cut and without atan2.

The published Adapt multiplies a phase by delta, which tears the circle open at +-pi unless delta is
an integer. Maps of the circle onto itself that stretch it smoothly, as delta does around a phase,
are the Blaschke factors B(z) = (z - alpha) / (1 - conj(alpha) z), |alpha| < 1: for z = e^{i theta}

    B = e^{i phi},   phi = theta + 2 arg(1 - alpha e^{-i theta}),
    d phi / d theta = (1 - |alpha|^2) / |1 - conj(alpha) e^{i theta}|^2.

The slope plays the part of delta, but depends on the phase: it is largest,
(1 + |alpha|) / (1 - |alpha|), for phases like alpha's, and the reciprocal on the opposite side. To
first order phi = theta + 2 |alpha| sin(theta - arg(alpha)). The mean slope is always 1, as a smooth
map must go round the circle once. Near |alpha| = 1 almost all phases become one, as with delta = 0.
"""

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.planes import (
    Pair,
    direction,
    from_pair,
    multiply,
    smooth_amplitude,
    to_pair,
    unit,
)


def smooth_adapt(x: jax.Array, a: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """|x| exp(i (phi(theta) + bias)) for every plane, phi the Moebius map above.

    Args:
        x: (..., H, d) queries or keys; plane i is (x[i], x[i + d/2]).
        a: (H, d) or (d,), paired likewise, without constraint: alpha = a / sqrt(1 + |a|^2). Zeros
            leave x as it is.
        bias: (H, P) or (P,), P = d/2, in radians, or None for zero (keys).

    Returns:
        (..., H, d) in x's dtype; the arithmetic is float32.

    Amplitudes are kept. The function is smooth, x = 0 included, where it is the identity: planes
    much smaller than `planes.EPSILON` keep their phases. Its derivative by x is at most the
    largest slope, (1 + |alpha|) / (1 - |alpha|) = (sqrt(1 + |a|^2) + |a|)^2.
    """
    a_pair = to_pair(a)
    bias = jnp.zeros_like(a_pair[0]) if bias is None else bias.astype(jnp.float32)
    return from_pair(_bend(to_pair(x), a_pair, bias)).astype(x.dtype)


@jax.custom_jvp
def _bend(x: Pair, a: Pair, bias: jax.Array) -> Pair:
    """X e^{i psi} with psi = phi - theta + bias."""
    return multiply(x, multiply(_turn(direction(x), a)[0], unit(bias)))


@_bend.defjvp
def _bend_jvp(
    primals: tuple[Pair, Pair, jax.Array], tangents: tuple[Pair, Pair, jax.Array]
) -> tuple[Pair, Pair]:
    # By hand for speed only: automatic differentiation keeps twice as many arrays.
    x, a, bias = primals
    d_x, d_a, d_bias = tangents
    amplitude, z = smooth_amplitude(x), direction(x)
    turn, w, size, s = _turn(z, a)
    turn = multiply(turn, unit(bias))
    y = multiply(x, turn)
    # dz = d(x / amplitude), dw = ds - da conj(z) - a conj(dz), d psi = 2 Im(dw / w) + d bias.
    along = z[0] * d_x[0] + z[1] * d_x[1]
    d_z = (d_x[0] - along * z[0]) / amplitude, (d_x[1] - along * z[1]) / amplitude
    d_s = (a[0] * d_a[0] + a[1] * d_a[1]) / s
    by_a, by_z = _times_conjugate(d_a, z), _times_conjugate(a, d_z)
    d_w = d_s - by_a[0] - by_z[0], -by_a[1] - by_z[1]
    d_psi = 2.0 * (w[0] * d_w[1] - w[1] * d_w[0]) / size + d_bias
    # dy = e^{i psi} dx + i y d psi.
    turned = multiply(turn, d_x)
    return y, (turned[0] - y[1] * d_psi, turned[1] + y[0] * d_psi)


def _turn(z: Pair, a: Pair) -> tuple[Pair, Pair, jax.Array, jax.Array]:
    """e^{i psi} = w^2 / |w|^2 of w = s (1 - alpha conj(z)); also w, |w|^2 and s.

    s = sqrt(1 + |a|^2), so that s alpha = a. It cancels.
    """
    s = jnp.sqrt(1.0 + a[0] ** 2 + a[1] ** 2)
    by_z = _times_conjugate(a, z)
    w = s - by_z[0], -by_z[1]
    # |w| is at least s - |a| > 1 / (2 s), which rounding could make 0 for |a| in the thousands.
    size = jnp.maximum(w[0] ** 2 + w[1] ** 2, (0.25 / s) ** 2)
    return ((w[0] ** 2 - w[1] ** 2) / size, 2.0 * w[0] * w[1] / size), w, size, s


def _times_conjugate(x: Pair, y: Pair) -> Pair:
    return multiply(x, (y[0], -y[1]))
