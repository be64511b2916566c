"""Polynomials against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention.trig import arctan2, cos_sin


def test_angles_of_all_sizes() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 200_000))
    x *= 10.0 ** rng.uniform(-30, 18, x.shape)
    y *= np.abs(x) * 10.0 ** rng.uniform(-6, 6, x.shape)
    x, y = x.astype(np.float32), y.astype(np.float32)
    # Not subnormal: what becomes of those is up to the processor.
    normal = np.minimum(np.abs(x), np.abs(y)) > 1e-36
    x, y = x[normal], y[normal]
    error = np.asarray(jax.jit(arctan2)(y, x), np.float64) - np.arctan2(*np.float64([y, x]))
    assert len(x) > 150_000 and np.abs(error).max() < 4e-7


def test_small_angles_keep_their_relative_precision() -> None:
    y = np.geomspace(1e-30, 1e-3, 1000).astype(np.float32)
    truth = np.arctan(np.float64(y))
    np.testing.assert_allclose(jax.jit(arctan2)(y, jnp.ones_like(y)), truth, rtol=2e-7)


def test_axes_and_the_branch_cut() -> None:
    one = np.float32(1)
    y = np.asarray([0, 1, 0, -1, -0.0, 1e-20, -1e-20], np.float32)
    x = np.asarray([1, 0, -1, 0, -1, -1, -1], np.float32)
    np.testing.assert_allclose(jax.jit(arctan2)(y, x), np.arctan2(y, x), rtol=1e-6)
    assert np.isnan(arctan2(one * np.nan, one)) and np.isnan(arctan2(one, one * np.nan))


@pytest.mark.parametrize("size", [0.0, 5e-38, 1e-38, 1e-45])
def test_no_phase_at_zero(size: float) -> None:
    x, y = np.meshgrid(np.float32([size, -size, 0.0, -0.0]), np.float32([size, -size]))
    assert np.all(np.abs(jax.jit(arctan2)(y, x)) == 0)


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_cosines_and_sines(size: float) -> None:
    angle = np.random.default_rng(0).uniform(-size, size, 200_000).astype(np.float32)
    angle = np.append(angle, np.float32(np.pi / 4 * np.arange(-8, 9)))
    cos, sin = np.asarray(jax.jit(cos_sin)(angle), np.float64)
    assert np.abs(cos - np.cos(np.float64(angle))).max() < 2e-7
    assert np.abs(sin - np.sin(np.float64(angle))).max() < 2e-7
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, rtol=4e-7)


def test_not_a_number_stays() -> None:
    assert np.isnan(cos_sin(jnp.float32(jnp.nan))).all()
