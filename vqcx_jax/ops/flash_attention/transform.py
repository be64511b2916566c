"""Phases of queries and keys inside a kernel, and the way back for gradients.

Blocks are transposed, channels along sublanes and positions along lanes: the real and the imaginary
parts of all planes are then whole registers for any head width, positions are one row, and what
belongs to a plane is one column.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vqcx_jax.ops.attention.phase import position_angle
from vqcx_jax.ops.attention.planes import smooth_amplitude
from vqcx_jax.ops.attention.polar import Turn, polar, pull_back_pair
from vqcx_jax.ops.attention.trig import cos_sin
from vqcx_jax.ops.flash_attention.amplitude import Amplitude


class Planes(NamedTuple):
    """What the planes of a head have, float32 (P, 1) each.

    omega: radians per position; None where phases of positions are given as such. delta: Adapt's
    slope; None: 1, without arctangents. bias: radians; None: 0. amplitude: instead of complex
    numbers; delta is None then. bias_turn: cosine and sine of the bias, in its place where omega
    is None.
    """

    omega: jax.Array | None
    delta: jax.Array | None
    bias: jax.Array | None
    amplitude: Amplitude | None
    bias_turn: tuple[jax.Array, jax.Array] | None = None


class PhaseGradients(NamedTuple):
    """Gradients by omega, delta and bias before the sum over positions, float32 (P, n) each."""

    omega: jax.Array
    delta: jax.Array | None
    bias: jax.Array


def turned(
    x: jax.Array,
    positions: jax.Array | tuple[jax.Array, jax.Array],
    planes: Planes,
    scale: float = 1.0,
) -> tuple[jax.Array, Turn]:
    """Scale mu exp(i (delta theta + bias + position omega)), as `encode.complex_queries_and_keys`.

    Or scale amplitude(x) exp(i (bias + position omega)), as `encode.amplitude_queries_and_keys` and
    `encode.pope_queries_and_keys`.

    Args:
        x: float32 (d, n), raw queries or keys.
        positions: int32 (1, n); or, without delta, cosine and sine of position omega, (P, n) each.

    Returns:
        float32 (2 P, n), and the phases.
    """
    if planes.amplitude is not None:
        cos, sin = _turn_of_positions(positions, planes)
        radius = _amplitude(x, planes.amplitude)
        if scale != 1.0:
            radius = scale * radius
        return jnp.concatenate([radius * cos, radius * sin]), Turn(cos, sin, None)
    real, imag = _halves(x)
    if planes.delta is None:
        cos, sin = _turn_of_positions(positions, planes)
        y = jnp.concatenate([real * cos - imag * sin, real * sin + imag * cos])
        return (y if scale == 1.0 else scale * y), Turn(cos, sin, None)
    assert not isinstance(positions, tuple)
    radius, theta = polar(real, imag)
    cos, sin = cos_sin(planes.delta * theta + _position_phase(positions, planes))
    if scale != 1.0:
        radius = scale * radius
    return jnp.concatenate([radius * cos, radius * sin]), Turn(cos, sin, theta)


def pull_back(
    x: jax.Array, positions: jax.Array, planes: Planes, turn: Turn, cotangent: jax.Array
) -> tuple[jax.Array, PhaseGradients]:
    """The gradient by x, and by the phases, of `turned` with scale 1. At 0 as in `euler`.

    Args:
        x, positions: as for `turned`. turn: what it returned. cotangent: float32 (2 P, n).

    Returns:
        float32 (d, n), and the gradients by phase parameters.
    """
    d_real, d_imag = _halves(cotangent)
    positions = positions.astype(jnp.float32)
    along = turn.cos * d_real + turn.sin * d_imag
    across = turn.cos * d_imag - turn.sin * d_real
    if planes.amplitude is not None:
        radius = _amplitude(x, planes.amplitude)
        d_phase = radius * across
        gradients = PhaseGradients(positions * d_phase, None, d_phase)
        return _pull_back_amplitude(x, planes.amplitude, radius, along), gradients
    real, imag = _halves(x)
    if planes.delta is None or turn.theta is None:
        d_phase = real * across - imag * along
        gradients = PhaseGradients(positions * d_phase, None, d_phase)
        return jnp.concatenate([along, across]), gradients
    d_halves, d_phase = pull_back_pair((real, imag), planes.delta, turn, (d_real, d_imag))
    gradients = PhaseGradients(positions * d_phase, turn.theta * d_phase, d_phase)
    return jnp.concatenate(d_halves), gradients


def _amplitude(x: jax.Array, kind: Amplitude) -> jax.Array:
    """Float32 (P, n) from (d, n)."""
    if kind == "modulus":
        return smooth_amplitude(_halves(x))
    # `jax.nn.softplus` without its selection for infinite x.
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _pull_back_amplitude(
    x: jax.Array, kind: Amplitude, amplitude: jax.Array, cotangent: jax.Array
) -> jax.Array:
    """The gradient by x, (d, n), from that by the amplitude, (P, n)."""
    if kind == "modulus":
        of_each = cotangent / amplitude
        return x * jnp.concatenate([of_each, of_each])
    return cotangent * jax.nn.sigmoid(x)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    half = x.shape[0] // 2
    return x[:half], x[half:]


def _turn_of_positions(
    positions: jax.Array | tuple[jax.Array, jax.Array], planes: Planes
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of bias + position omega."""
    if not isinstance(positions, tuple):
        return cos_sin(_position_phase(positions, planes))
    if planes.bias_turn is None:
        return positions
    (cos, sin), (bias_cos, bias_sin) = positions, planes.bias_turn
    return cos * bias_cos - sin * bias_sin, sin * bias_cos + cos * bias_sin


def _position_phase(positions: jax.Array, planes: Planes) -> jax.Array:
    assert planes.omega is not None
    angle = position_angle(positions.astype(jnp.float32), planes.omega)
    return angle if planes.bias is None else angle + planes.bias
