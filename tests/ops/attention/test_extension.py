"""Frequencies for longer contexts, against the formulas of the papers."""

import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.ops.attention import (
    linear_frequencies,
    ntk_frequencies,
    rope_frequencies,
    yarn_frequencies,
    yarn_magnitude,
)

BASE, HEAD_DIM, FACTOR, LENGTH = 10_000.0, 64, 8.0, 2048
OMEGA = rope_frequencies(HEAD_DIM, BASE)


def test_linear() -> None:
    np.testing.assert_allclose(linear_frequencies(OMEGA, FACTOR), OMEGA / 8, rtol=1e-7)


def test_ntk_is_another_base() -> None:
    other = BASE * FACTOR ** (HEAD_DIM / (HEAD_DIM - 2))
    actual = ntk_frequencies(OMEGA, FACTOR)
    np.testing.assert_allclose(actual, rope_frequencies(HEAD_DIM, other), rtol=5e-6)
    assert actual[0] == 1.0
    np.testing.assert_allclose(actual[-1], OMEGA[-1] / FACTOR, rtol=1e-6)
    assert ntk_frequencies(jnp.ones(1), FACTOR) == 1.0


def test_ntk_of_planes_that_turn() -> None:
    """The lowest of them is divided by factor, whatever other planes there are."""
    partial = rope_frequencies(HEAD_DIM, fraction=0.75)
    actual = ntk_frequencies(partial, FACTOR)
    assert actual[0] == 1.0
    np.testing.assert_allclose(actual[23], partial[23] / FACTOR, rtol=1e-6)
    np.testing.assert_array_equal(actual[24:], np.zeros(8))


def test_yarn() -> None:
    actual = yarn_frequencies(OMEGA, FACTOR, LENGTH)
    for omega, changed in zip(np.asarray(OMEGA, np.float64), actual, strict=True):
        wavelength = 2 * np.pi / omega
        kept = np.clip((LENGTH / wavelength - 1) / (32 - 1), 0, 1)
        assert changed == pytest.approx((1 - kept) * omega / FACTOR + kept * omega, rel=1e-5)
    turns = LENGTH * OMEGA / (2 * np.pi)
    np.testing.assert_array_equal(actual[turns > 32], OMEGA[turns > 32])
    np.testing.assert_allclose(actual[turns < 1], OMEGA[turns < 1] / FACTOR, rtol=1e-6)
    assert np.any((turns > 1) & (turns < 32))
    assert yarn_magnitude(1.0) == 1.0
    assert yarn_magnitude(16.0) == pytest.approx(1.2772588722)


@pytest.mark.parametrize("function", [linear_frequencies, ntk_frequencies])
def test_of_each_head_and_planes_that_do_not_turn(function: object) -> None:
    partial = rope_frequencies(HEAD_DIM, fraction=0.5)
    both = jnp.stack([partial, OMEGA])
    assert callable(function)
    np.testing.assert_allclose(function(both, FACTOR)[1], function(OMEGA, FACTOR), rtol=1e-6)
    np.testing.assert_array_equal(function(both, FACTOR)[0, 16:], np.zeros(16))
    np.testing.assert_array_equal(yarn_frequencies(both, FACTOR, LENGTH)[0, 16:], np.zeros(16))


def test_factor_one_changes_nothing() -> None:
    for actual in (
        linear_frequencies(OMEGA, 1.0),
        ntk_frequencies(OMEGA, 1.0),
        yarn_frequencies(OMEGA, 1.0, LENGTH),
    ):
        np.testing.assert_allclose(actual, OMEGA, rtol=1e-6)


def test_refused() -> None:
    for call in (
        lambda: linear_frequencies(OMEGA, 0.5),
        lambda: ntk_frequencies(OMEGA, 0.5),
        lambda: yarn_frequencies(OMEGA, 0.5, LENGTH),
        lambda: yarn_magnitude(0.5),
    ):
        with pytest.raises(UserError, match="factor=0.5: must be at least 1"):
            call()
    with pytest.raises(UserError, match="beta_fast=1.0: must be above beta_slow=2.0"):
        yarn_frequencies(OMEGA, FACTOR, LENGTH, beta_fast=1.0, beta_slow=2.0)
