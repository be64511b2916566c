"""The closed form of two codebooks against its definition, above all where Z underflows."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from multi_cases import CASES, Case, assert_equal_definition
from versions import oldest_jax

from vqcx_jax.ops.codebook import bilinear

pytestmark = oldest_jax


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32(case: Case, in_float64: Any, max_error: Any) -> None:
    assert_equal_definition(bilinear.nll, case, jnp.float32, in_float64, max_error)


@pytest.mark.parametrize("name", ["ragged_product", "logits_x100"])
def test_bfloat16(name: str, in_float64: Any, max_error: Any) -> None:
    assert_equal_definition(bilinear.nll, CASES[name], jnp.bfloat16, in_float64, max_error)


@pytest.mark.parametrize("has_bias", [True, False])
def test_cell_log_mass(has_bias: bool) -> None:
    rng = np.random.default_rng(0)
    assignment = np.stack([rng.integers(5, size=30), rng.integers(7, size=30)], axis=1)
    bias = rng.standard_normal(30) if has_bias else np.zeros(30)
    expected = np.full((5, 7), -np.inf)
    for i, j in assignment:
        expected[i, j] = scipy.special.logsumexp(bias[np.all(assignment == (i, j), axis=1)])
    actual = bilinear.cell_log_mass(
        jnp.asarray(assignment), (5, 7), jnp.asarray(bias, jnp.float32) if has_bias else None
    )
    assert np.isneginf(actual).any()
    chex.assert_trees_all_close(actual, expected.astype(np.float32), rtol=1e-6, atol=1e-6)


def value_and_gradients(l1: Any, l2: Any, log_mass: Any) -> Any:
    """log Z and the gradients of its sum."""
    value, vjp = jax.vjp(lambda *x: bilinear.log_z(x[:2], x[2]), l1, l2, log_mass)
    return value, vjp(jnp.ones_like(value))


def definition(l1: Any, l2: Any, log_mass: Any) -> Any:
    def log_z(l1: Any, l2: Any, log_mass: Any) -> Any:
        cells = l1[..., :, None] + l2[..., None, :] + log_mass
        return jax.nn.logsumexp(cells, axis=(-2, -1))

    value, vjp = jax.vjp(log_z, l1, l2, log_mass)
    return value, vjp(jnp.ones_like(value))


def without_guard(l1: Any, l2: Any, log_mass: Any) -> Any:
    """The matrix product with the usual shift by the maxima."""
    peaks = [jnp.max(l, axis=-1, keepdims=True) for l in (l1, l2)]
    z = jnp.sum((jnp.exp(l1 - peaks[0]) @ jnp.exp(log_mass)) * jnp.exp(l2 - peaks[1]), axis=-1)
    return jnp.log(z) + peaks[0][..., 0] + peaks[1][..., 0]


def assert_equal(actual: Any, expected: Any, max_error: Any) -> None:
    chex.assert_trees_all_close(actual[0], expected[0].astype(np.float32), rtol=1e-5, atol=1e-5)
    for gradient, true in zip(actual[1], expected[1], strict=True):
        assert max_error(gradient, true) <= 1e-5


def opposed(scale: float) -> tuple[jax.Array, ...]:
    """Code i of one codebook meets only code i of the other, whose logit is low when i's is high.

    So no token joins two good codes, and max l1 + max l2 says nothing about log Z.
    """
    rng = np.random.default_rng(0)
    l1 = scale * rng.standard_normal((20, 64))
    l2 = -l1 + scale * 0.2 * rng.standard_normal((20, 64))
    log_mass = jnp.where(jnp.eye(64, dtype=bool), 0.3, -jnp.inf)
    return jnp.asarray(l1, jnp.float32), jnp.asarray(l2, jnp.float32), log_mass


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0, 100.0])
def test_best_codes_without_a_token(scale: float, in_float64: Any, max_error: Any) -> None:
    x = opposed(scale)
    plain = jax.jit(without_guard)(*x)
    # The trap is real: at x30 the plain product finds Z = 0 at every position, at x1 it is right.
    assert np.isneginf(plain).all() == (scale >= 30)
    actual = jax.jit(value_and_gradients)(*x)
    chex.assert_tree_all_finite(actual)
    assert_equal(actual, in_float64(definition, *x), max_error)


def test_exact_at_every_depth(in_float64: Any, max_error: Any) -> None:
    """Three equal terms, from the height of the maxima to 200 below."""
    depth = np.linspace(0, 200, 401)
    l = jnp.asarray(np.stack([0 * depth, -depth / 2, -depth], axis=1), jnp.float32)
    x = (l, l, jnp.where(jnp.eye(3, dtype=bool)[::-1], 5.0, -jnp.inf))
    expected = in_float64(definition, *x)
    plain = np.asarray(jax.jit(without_guard)(*x))
    # The plain product first loses two of the terms, which nothing shows, and then the third.
    is_wrong = np.abs(plain - expected[0]) > 1
    assert np.isneginf(plain[-1]) and np.isfinite(plain[np.argmax(is_wrong)])
    assert_equal(jax.jit(value_and_gradients)(*x), expected, max_error)


def test_many_small_losses(in_float64: Any, max_error: Any) -> None:
    """A thousand terms that float32 cannot hold weigh half as much as one that it can."""
    l1 = jnp.asarray([[0.0, -40.0, -500.0]])
    l2 = jnp.asarray([[0.0, -43.0] + [-90.0] * 1000])
    log_mass = jnp.full((3, 1002), -jnp.inf)
    log_mass = log_mass.at[0, 2:].set(0.0).at[1, 1].set(0.0).at[2, 0].set(0.0)
    x = (l1, l2, log_mass)
    expected = in_float64(definition, *x)
    plain = np.asarray(jax.jit(without_guard)(*x))
    assert np.isfinite(plain).all() and np.abs(plain - expected[0]).max() > 0.1
    assert_equal(jax.jit(value_and_gradients)(*x), expected, max_error)


def test_extreme_bias_of_the_cells(in_float64: Any, max_error: Any) -> None:
    """The heaviest cell is out of reach of most positions: B itself underflows for them."""
    rng = np.random.default_rng(0)
    l1, l2 = (rng.standard_normal((30, k)) for k in (9, 11))
    log_mass = rng.standard_normal((9, 11))
    log_mass[0, 0] = 150.0
    l1[1:, 0] = -100.0
    l2[1:, 0] = -100.0
    x = [jnp.asarray(y, jnp.float32) for y in (l1, l2, log_mass)]
    assert_equal(jax.jit(value_and_gradients)(*x), in_float64(definition, *x), max_error)


def test_tokens_with_bias_minus_infinity_are_impossible() -> None:
    rng = np.random.default_rng(0)
    l = tuple(jnp.asarray(rng.standard_normal((6, 3)), jnp.float32) for _ in range(2))
    assignment = jnp.asarray(np.stack([np.arange(12) % 3, np.arange(12) // 6], axis=1))
    # One token of a cell and every token of another.
    banned = (jnp.arange(12) == 0) | jnp.all(assignment == jnp.asarray([1, 1]), axis=1)
    bias = jnp.where(banned, -jnp.inf, 0.5)

    def loss(l: Any, bias: jax.Array) -> jax.Array:
        return jnp.sum(bilinear.nll(l, assignment, jnp.full((6,), 2), bias)[0])

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(l, bias)
    chex.assert_tree_all_finite((value, gradients))
    assert not np.any(gradients[1][banned])


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_nan_stays_at_its_position(scale: float) -> None:
    l1, l2, log_mass = opposed(scale)
    z, (d_l1, d_l2, _) = jax.jit(value_and_gradients)(l1.at[3].set(jnp.nan), l2, log_mass)
    is_third = np.arange(20) == 3
    np.testing.assert_array_equal(np.isnan(z), is_third)
    for gradient in (d_l1, d_l2):
        np.testing.assert_array_equal(np.isnan(gradient), np.tile(is_third[:, None], 64))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_vmap_equals_leading_axes(scale: float) -> None:
    l1, l2, log_mass = opposed(scale)
    whole = jax.jit(value_and_gradients)(l1, l2, log_mass)
    z, (d_l1, d_l2, d_mass) = jax.jit(jax.vmap(value_and_gradients, (0, 0, None)))(l1, l2, log_mass)
    chex.assert_trees_all_close((z, (d_l1, d_l2, d_mass.sum(0))), whole, rtol=1e-5, atol=1e-6)
