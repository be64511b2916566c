"""`smooth_adapt` against the Moebius map over complex numbers, and its hand-written derivative."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention import smooth_adapt
from vqcx_jax.ops.attention.planes import EPSILON

A, BIAS = (0.6, -0.4), 0.2


def pair(z: np.ndarray) -> np.ndarray:
    return np.stack([z.real, z.imag], axis=-1)


def blaschke(x: Any, a: Any, bias: Any, epsilon: float = EPSILON) -> np.ndarray:
    """|x| B(x / |x|) e^{i bias} of x (N, 2), a (N, 2), bias (N,), in complex128."""
    x, a = (np.asarray(y, np.float64) @ [1, 1j] for y in (x, a))
    alpha = a / np.sqrt(1 + np.abs(a) ** 2)
    z = x / np.sqrt(np.abs(x) ** 2 + epsilon**2)
    w = 1 - alpha * np.conj(z)
    return pair(x * (w / np.conj(w)) * np.exp(1j * np.asarray(bias, np.float64)))


def plane(x: jax.Array, a: jax.Array, bias: jax.Array) -> jax.Array:
    """`smooth_adapt` of one plane: x (2,), a (2,), bias ()."""
    return smooth_adapt(x[None], a[None], bias[None, None])[0]


def random_arguments(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    normal = np.random.default_rng(0).standard_normal
    x, a, bias = (normal(shape).astype(np.float32) for shape in ((count, 2), (count, 2), count))
    return x, a, bias


def test_is_the_blaschke_factor() -> None:
    """On planes of ordinary size the smoothing does not show: |z - alpha| = |1 - conj(alpha) z|."""
    x, a, bias = random_arguments(200)
    x, a = x[(radius := np.hypot(*x.T)) > 0.1], a[radius > 0.1]
    bias = bias[radius > 0.1]
    z = x.astype(np.float64) @ [1, 1j]
    size = np.abs(z)
    alpha = a @ [1, 1j] / np.sqrt(1 + np.sum(a.astype(np.float64) ** 2, axis=1))
    factor = (z / size - alpha) / (1 - np.conj(alpha) * z / size)
    expected = pair(size * factor * np.exp(1j * bias))
    actual = smooth_adapt(x[:, None, :], a[:, None], bias[:, None, None])[:, 0]
    # (EPSILON / 0.1)^2 / 2 = 5e-5, times a slope.
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=2e-4)


def test_values_at_every_size() -> None:
    x, a, bias = random_arguments(300)
    x *= np.float32(10) ** np.random.default_rng(1).integers(-6, 7, (300, 1))
    error = smooth_adapt(x[:, None], a[:, None], bias[:, None, None])[:, 0] - blaschke(x, a, bias)
    assert np.max(np.abs(error) / np.hypot(*x.T)[:, None]) <= 5e-6


def test_derivatives_by_finite_differences() -> None:
    arguments = random_arguments(60)
    arguments[0][:20] *= np.float32(EPSILON)  # Planes that the smoothing shapes.
    normal = np.random.default_rng(2).standard_normal
    scale = np.where(np.arange(60) < 20, EPSILON, 1.0)
    tangents = normal((60, 2)) * scale[:, None], normal((60, 2)), normal(60)
    step = 1e-6
    after, before = (
        blaschke(*(a + sign * step * t for a, t in zip(arguments, tangents, strict=True)))
        for sign in (1, -1)
    )
    numerical = (after - before) / (2 * step)
    _, jvp = jax.jit(lambda a, t: jax.jvp(jax.vmap(plane), a, t))(
        tuple(map(jnp.asarray, arguments)), tuple(jnp.asarray(t, jnp.float32) for t in tangents)
    )
    # Slopes of up to 30 here.
    chex.assert_trees_all_close(jvp / scale[:, None], numerical / scale[:, None], rtol=0, atol=1e-4)


def test_forward_and_reverse_agree_and_there_are_second_derivatives() -> None:
    """At 0 too, which is what `euler_adapt` cannot."""
    x, a, bias = (jnp.asarray(v) for v in random_arguments(4))
    x = x.at[0].set(0.0)

    @jax.jit
    @jax.vmap
    def derivatives(*arguments: jax.Array) -> Any:
        forward, reverse = (d(plane, (0, 1, 2)) for d in (jax.jacfwd, jax.jacrev))
        second = jax.jacfwd(lambda x: jax.jacfwd(plane)(x, *arguments[1:]))(arguments[0])
        return forward(*arguments), reverse(*arguments), second

    forward, reverse, second = derivatives(x, a, bias)
    chex.assert_trees_all_close(forward, reverse, rtol=1e-5, atol=1e-5)
    chex.assert_tree_all_finite(second)
    # At 0 the map is the turn by the bias.
    cos, sin = np.cos(bias[0]), np.sin(bias[0])
    chex.assert_trees_all_close(forward[0][0], np.asarray([[cos, -sin], [sin, cos]]), atol=1e-6)


def test_slope_is_that_of_the_docstring() -> None:
    """(1 - |alpha|^2) / |1 - conj(alpha) e^{i theta}|^2, and its mean is 1: once round."""
    theta = np.linspace(-np.pi, np.pi, 400, endpoint=False)
    x = jnp.asarray(np.stack([np.cos(theta), np.sin(theta)], axis=-1), jnp.float32)
    a, bias = jnp.asarray(A), jnp.asarray(BIAS)
    along = jnp.stack([-x[:, 1], x[:, 0]], axis=-1)
    _, moved = jax.jvp(jax.vmap(lambda x: plane(x, a, bias)), (x,), (along,))
    alpha = np.asarray(A) @ [1, 1j] / np.sqrt(1 + np.sum(np.square(A)))
    slope = (1 - abs(alpha) ** 2) / np.abs(1 - np.conj(alpha) * np.exp(1j * theta)) ** 2
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), slope, rtol=1e-4)
    np.testing.assert_allclose(np.mean(slope), 1.0, rtol=1e-6)
    largest = (np.hypot(1, np.hypot(*A)) + np.hypot(*A)) ** 2
    assert slope.max() == pytest.approx(largest, rel=1e-3)
    assert theta[slope.argmax()] == pytest.approx(np.arctan2(A[1], A[0]), abs=0.02)


def test_amplitude_is_kept() -> None:
    x, a, bias = random_arguments(100)
    y = smooth_adapt(x[:, None], a[:, None], bias[:, None, None])[:, 0]
    np.testing.assert_allclose(np.hypot(*y.T), np.hypot(*x.T), rtol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_and_subnormal_numbers(dtype: Any) -> None:
    """The map is the identity there."""
    points = [(0.0, 0.0), (-0.0, -0.0), (1e-40, -1e-40), (1e-45, 0.0), (2.0**-126, 1e-40)]
    x = jnp.asarray(points, jnp.float32).astype(dtype)
    y, by_x = jax.vmap(lambda x: (plane(x, jnp.asarray(A), jnp.zeros(())),) * 2)(x)
    np.testing.assert_allclose(y.astype(jnp.float32), x.astype(jnp.float32), atol=2.0**-126)
    by_x = jax.vmap(jax.jacrev(lambda x: plane(x, jnp.asarray(A), jnp.zeros(()))))(x)
    np.testing.assert_allclose(
        by_x.astype(jnp.float32), np.broadcast_to(np.eye(2), by_x.shape), atol=1e-5
    )


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_extreme_parameters_stay_finite(size: float) -> None:
    """Towards |alpha| = 1 the denominator vanishes at the phase of alpha."""
    for direction in [(1.0, 0.0), (0.6, -0.8)]:
        x = jnp.asarray(direction)
        y, vjp = jax.vjp(plane, x, size * x, jnp.zeros(()))
        chex.assert_tree_all_finite((y, vjp(jnp.ones(2))))
        assert float(jnp.linalg.norm(y)) <= 1.01
