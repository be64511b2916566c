"""`euler_adapt`: mu exp(i (delta theta + b)) and its hand-written derivative."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention import euler_adapt

DELTA, BIAS = 0.3, 0.2  # Not an integer: the derivative at 0 then depends on the direction.


def plane(x: jax.Array, delta: jax.Array, bias: jax.Array) -> jax.Array:
    """`euler_adapt` of one plane: x (2,), delta and bias ()."""
    return euler_adapt(x[None], delta[None, None], bias[None, None])[0]


class Exact(NamedTuple):
    """Value (N, 2) and derivatives by x (N, 2, 2), delta (N, 2) and bias (N, 2)."""

    value: np.ndarray
    by_x: np.ndarray
    by_delta: np.ndarray
    by_bias: np.ndarray


@jax.jit
@jax.vmap
def value_and_derivatives(x: jax.Array, delta: jax.Array, bias: jax.Array) -> Any:
    return plane(x, delta, bias), *jax.jacrev(plane, (0, 1, 2))(x, delta, bias)


def exact(x: Any, delta: Any, bias: Any) -> Exact:
    """The formula and its derivative over complex float64 numbers."""
    x, delta, bias = (np.asarray(a, np.float64) for a in (x, delta, bias))
    radius, theta = np.hypot(x[:, 0], x[:, 1]), np.arctan2(x[:, 1], x[:, 0])
    turn = np.exp(1j * (delta * theta + bias))
    by_real = turn * (np.cos(theta) - 1j * delta * np.sin(theta))
    by_imag = turn * (np.sin(theta) + 1j * delta * np.cos(theta))

    def pair(z: np.ndarray) -> np.ndarray:
        return np.stack([z.real, z.imag], axis=-1)

    return Exact(
        pair(radius * turn),
        np.stack([pair(by_real), pair(by_imag)], axis=-1),
        pair(1j * radius * theta * turn),
        pair(1j * radius * turn),
    )


def test_values_and_derivatives() -> None:
    rng = np.random.default_rng(0)
    x, delta, bias = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((500, 2), (500,), (500,))
    )
    x *= np.float32(10) ** rng.integers(-6, 7, (500, 1))  # Every size of amplitude.
    radius = np.hypot(x[:, 0], x[:, 1])
    truth = exact(x, delta, bias)
    actual = Exact(*value_and_derivatives(x, delta, bias))
    # Phases are a few units of float32: rounded by about 3e-7 each, twice.
    chex.assert_trees_all_close(actual.by_x, truth.by_x, rtol=0, atol=2e-6)
    for name in ("value", "by_delta", "by_bias"):
        error = (getattr(actual, name) - getattr(truth, name)) / radius[:, None]
        assert np.abs(error).max() <= 4e-6, name


def test_derivative_by_finite_differences() -> None:
    """The oracle itself, and with it the derivative, against differences of the formula."""
    rng = np.random.default_rng(1)
    arguments = rng.standard_normal((50, 2)), rng.standard_normal(50), rng.standard_normal(50)
    tangents = rng.standard_normal((50, 2)), rng.standard_normal(50), rng.standard_normal(50)
    step = 1e-6
    after = exact(*(a + step * t for a, t in zip(arguments, tangents, strict=True))).value
    before = exact(*(a - step * t for a, t in zip(arguments, tangents, strict=True))).value
    numerical = (after - before) / (2 * step)

    def narrow(tree: Any) -> Any:
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)

    _, jvp = jax.jit(lambda a, t: jax.jvp(jax.vmap(plane), a, t))(
        narrow(arguments), narrow(tangents)
    )
    # Differences are good to 1e-9 away from the cut; the rest is the rounding of the arguments.
    chex.assert_trees_all_close(jvp, numerical, rtol=0, atol=1e-5)


def test_forward_reverse_and_second_derivatives() -> None:
    rng = np.random.default_rng(2)
    x, delta, bias = rng.standard_normal((20, 2)), rng.standard_normal(20), rng.standard_normal(20)

    def plain(x: jax.Array, delta: jax.Array, bias: jax.Array) -> jax.Array:
        angle = delta * jnp.arctan2(x[1], x[0]) + bias
        return jnp.hypot(x[0], x[1]) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    def derivatives(function: Any) -> Any:
        def of_one(*arguments: jax.Array) -> Any:
            first = jax.jacfwd(function, (0, 1, 2))
            return (
                first(*arguments),
                jax.jacrev(function, (0, 1, 2))(*arguments),
                jax.jacfwd(first, (0, 1, 2))(*arguments),
                jax.jacrev(first, (0, 1, 2))(*arguments),
            )

        return jax.jit(jax.vmap(of_one))

    arguments = tuple(a.astype(np.float32) for a in (x, delta, bias))
    actual = derivatives(plane)(*arguments)
    with jax.enable_x64(True):
        wide = tuple(a.astype(np.float64) for a in arguments)
        expected = jax.tree.map(np.asarray, derivatives(plain)(*wide))
    # Second derivatives grow as 1/radius (up to 30 here), and so does their rounding.
    chex.assert_trees_all_close(actual, expected, rtol=2e-6, atol=5e-5)


SMALL, SUBNORMAL = 2.0**-126, 1e-40
SPECIAL = {
    "zero": (0.0, 0.0),
    "minus_zero_real": (-0.0, 0.0),
    "minus_zero_imag": (0.0, -0.0),
    "minus_zero": (-0.0, -0.0),
}
AXES = [(1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (-0.0, 1.0), (1.0, -0.0), (-1.0, 0.0), (-1.0, -0.0)]
SUBNORMALS = [
    (SUBNORMAL, SUBNORMAL),
    (-SUBNORMAL, SUBNORMAL),
    (-SUBNORMAL, -SUBNORMAL),
    (SUBNORMAL, 0.0),
    (0.0, SUBNORMAL),
    (1e-45, -1e-45),
    (SMALL, SUBNORMAL),
    (1.0, SUBNORMAL),
    (SUBNORMAL, 1.0),
]
HUGE = [(2e38, -1e38), (-1e38, 1.0), (1e-30, 1e38), (2e20, -3e25)]


def of_points(points: Any, dtype: Any = jnp.float32) -> Exact:
    x = jnp.asarray(points, jnp.float32).astype(dtype)
    full = jnp.full(len(x), DELTA, jnp.float32)
    return Exact(*value_and_derivatives(x, full, jnp.full_like(full, BIAS)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x", SPECIAL.values(), ids=SPECIAL.keys())
def test_at_zero(x: tuple[float, float], dtype: Any) -> None:
    """Theta is 0 there, whatever the signs of the zeros: d = e^{ib} (d real + i delta d imag)."""
    actual = of_points([x], dtype)
    truth = exact([(0.0, 0.0)], DELTA, BIAS)
    assert actual.value.dtype == actual.by_x.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 2.0**-8
    for derivative, expected in zip(actual, truth, strict=True):
        np.testing.assert_allclose(np.asarray(derivative, np.float64), expected, atol=tolerance)


def test_on_the_axes() -> None:
    actual, truth = of_points(AXES), exact(AXES, DELTA, BIAS)
    chex.assert_trees_all_close(actual, truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_subnormal_numbers(dtype: Any) -> None:
    """Devices may flush them to zero, so values are 0 or right, and derivatives bounded by 1."""
    actual = of_points(SUBNORMALS, dtype)
    chex.assert_tree_all_finite(actual)
    truth = exact(SUBNORMALS, DELTA, BIAS)
    tolerance = 1e-6 if dtype == jnp.float32 else 2.0**-7
    np.testing.assert_allclose(
        np.asarray(actual.value, np.float64), truth.value, rtol=tolerance, atol=SMALL
    )
    assert np.all(np.linalg.norm(np.asarray(actual.by_x, np.float64), axis=(1, 2)) < 1.1)


def test_huge_numbers() -> None:
    """Squares of these overflow; the amplitude does not."""
    actual, truth = of_points(HUGE), exact(HUGE, DELTA, BIAS)
    chex.assert_tree_all_finite(actual)
    chex.assert_trees_all_close(actual.by_x, truth.by_x, rtol=0, atol=1e-6)
    radius = np.hypot(*np.asarray(HUGE).T)[:, None]
    for name in ("value", "by_delta", "by_bias"):
        error = (np.asarray(getattr(actual, name), np.float64) - getattr(truth, name)) / radius
        assert np.abs(error).max() <= 2e-6, name


@pytest.mark.parametrize("imag", [1e-3, 1e-30, 1e-38, 1e-45, 0.0])
def test_across_the_branch_cut(imag: float) -> None:
    """The function jumps from one side to the other; both sides are finite and right."""
    points = [(-1.0, imag), (-1.0, -imag)]
    actual, truth = of_points(points), exact(points, DELTA, BIAS)
    chex.assert_tree_all_finite(actual)
    chex.assert_trees_all_close(actual, truth, rtol=0, atol=2e-6)
    # |e^{i delta pi} - e^{-i delta pi}| = 2 sin(delta pi) = 1.62.
    assert np.linalg.norm(actual.value[0] - actual.value[1]) > 1.6


def test_nan_and_infinity_are_not_hidden() -> None:
    assert np.all(np.isnan(of_points([(np.nan, 0.0), (0.0, np.nan)]).value))
    assert not np.any(np.isfinite(of_points([(np.inf, 1.0)]).value))


def test_bfloat16_is_rounded_once() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 6)).astype(jnp.bfloat16)
    delta, bias = jnp.full((2, 3), DELTA), jnp.full((2, 3), BIAS)
    actual = jax.jit(euler_adapt)(x, delta, bias)
    wide = jax.jit(euler_adapt)(x.astype(jnp.float32), delta, bias)
    assert actual.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(actual, wide.astype(jnp.bfloat16))


def test_no_bias_is_zero_bias_and_delta_is_broadcast() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 6))
    delta = jnp.asarray([0.5, 1.0, 2.0])
    each_head = jnp.broadcast_to(delta, (2, 3))
    expected = euler_adapt(x, each_head, jnp.zeros((2, 3)))
    chex.assert_trees_all_equal(euler_adapt(x, delta), expected)
    chex.assert_trees_all_equal(euler_adapt(x, each_head), expected)
    chex.assert_trees_all_equal(
        euler_adapt(x, jnp.full(1, 0.5), jnp.full(1, 2.0)),
        euler_adapt(x, jnp.full((2, 3), 0.5), jnp.full((2, 3), 2.0)),
    )


def test_gradients_of_shared_parameters_are_sums_over_heads() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 6))
    delta, bias = jnp.asarray([0.5, 1.0, 2.0]), jnp.asarray([0.1, -0.2, 3.0])

    def gradients(delta: jax.Array, bias: jax.Array) -> Any:
        return jax.grad(lambda d, b: jnp.sum(euler_adapt(x, d, b) ** 3), (0, 1))(delta, bias)

    each = gradients(*(jnp.broadcast_to(p, (2, 3)) for p in (delta, bias)))
    summed = jax.tree.map(lambda g: g.sum(0), each)
    chex.assert_trees_all_close(gradients(delta, bias), summed, rtol=1e-5)


def test_amplitude_is_kept() -> None:
    x = jax.random.normal(jax.random.key(0), (50, 1, 8))
    y = euler_adapt(x, jnp.asarray([[-1.0, 0.0, 0.7, 3.0]]), jnp.ones((1, 4)))

    def radius(z: jax.Array) -> jax.Array:
        return jnp.hypot(*jnp.split(z, 2, axis=-1))

    chex.assert_trees_all_close(radius(y), radius(x), rtol=1e-6)


@pytest.mark.parametrize("tiny", [[0.0, 5e-38], [-5e-38, 0.0], [8e-38, 8e-38]])
def test_what_has_no_phase_has_the_gradient_of_zero(tiny: list[float]) -> None:
    delta, bias = jnp.asarray([0.7]), jnp.asarray([0.3])
    jacobian = jax.jit(jax.jacfwd(lambda x: euler_adapt(x, delta, bias)))
    chex.assert_trees_all_close(jacobian(jnp.asarray(tiny)), jacobian(jnp.zeros(2)), rtol=1e-6)
