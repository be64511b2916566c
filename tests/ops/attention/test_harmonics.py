"""`key_harmonics` and `query_harmonics`: powers of phases at kept amplitudes."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention import key_harmonics, query_harmonics
from vqcx_jax.ops.attention.planes import EPSILON


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def as_complex(x: Any) -> np.ndarray:
    real, imag = np.split(np.asarray(x, np.float64), 2, axis=-1)
    return real + 1j * imag


def exact(x: Any, num_harmonics: int) -> np.ndarray:
    """mu e^{i r theta}, complex (..., R, P), of amplitudes that the smoothing leaves."""
    z = as_complex(x)
    r = np.arange(num_harmonics)[:, None]
    return np.abs(z)[..., None, :] * np.exp(1j * r * np.angle(z)[..., None, :])


@pytest.mark.parametrize("num_harmonics", [1, 2, 5])
def test_keys(num_harmonics: int) -> None:
    k = random(3, 2, 10)
    k = k + np.sign(k)  # Amplitudes above 1.
    actual = key_harmonics(k, num_harmonics)
    assert actual.shape == (3, 2, num_harmonics * 10)
    expected = exact(k, num_harmonics).reshape(3, 2, -1)
    # The smoothing is EPSILON^2 / 2 for each power of the direction.
    chex.assert_trees_all_close(as_complex(actual), expected, rtol=0, atol=1e-5)


def test_queries() -> None:
    q, weights, bias = random(3, 2, 10), random(2, 4, 5), random(2, 4, 5)[::-1]
    q = q + np.sign(q)
    expected = weights * np.exp(1j * bias.astype(np.float64)) * exact(q, 4)
    actual = as_complex(query_harmonics(q, weights, bias))
    chex.assert_trees_all_close(actual, expected.reshape(3, 2, -1), rtol=0, atol=2e-5)


def test_weights_get_gradients_where_they_are_zero() -> None:
    """At the start only r = 1 counts; the others must be able to grow."""
    q, k = random(2, 8), random(2, 8)[::-1]
    start = jnp.zeros((2, 3, 4)).at[:, 1].set(1.0)

    def score(weights: jax.Array) -> jax.Array:
        return jnp.vdot(query_harmonics(q, weights, 0 * weights), key_harmonics(k, 3))

    assert np.all(np.abs(jax.grad(score)(start)) > 0)


def test_zero_is_smooth() -> None:
    """r = 0 is EPSILON there, without direction; r = 1 the identity; higher ones vanish."""
    zero = jnp.zeros((1, 2))
    np.testing.assert_allclose(key_harmonics(zero, 4)[0], [EPSILON, 0, 0, 0, 0, 0, 0, 0])
    by_x = jax.jacfwd(key_harmonics)(zero, 4)[0, :, 0]
    expected = np.zeros((8, 2))
    expected[1, 0] = expected[5, 1] = 1
    np.testing.assert_allclose(by_x, expected, atol=1e-6)
    chex.assert_tree_all_finite(jax.jit(jax.hessian(lambda k: key_harmonics(k, 3)))(zero))
