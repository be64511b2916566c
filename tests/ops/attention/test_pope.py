"""PoPE's amplitudes, frequencies and clamped bias; its scores are tested in test_encode."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention import (
    clamp_bias,
    pope_frequencies,
    pope_queries_and_keys,
    rotary_table,
)


def test_frequencies() -> None:
    expected = np.asarray([100.0 ** (-c / 6) for c in range(6)], np.float32)
    chex.assert_trees_all_close(pope_frequencies(6, 100.0), expected, rtol=1e-6)


def test_bias_is_clamped_and_can_come_back() -> None:
    bias = jnp.asarray([-7.0, -2 * np.pi, -1.0, 0.0, 0.5])
    value, gradient = jax.vmap(jax.value_and_grad(clamp_bias))(bias)
    np.testing.assert_allclose(value, np.clip(bias, -2 * np.pi, 0.0), rtol=1e-6)
    np.testing.assert_array_equal(gradient, np.ones(5))


def test_content_never_turns_a_phase() -> None:
    """Whatever q and k are, a score at distance 0 without bias is positive."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8)) * 10
    table = rotary_table(jnp.asarray([[5]]), pope_frequencies(8))
    q, k = pope_queries_and_keys(q, k, *table, jnp.zeros((1, 8)))
    chex.assert_shape((q, k), (1, 1, 1, 16))
    assert float(jnp.vdot(q, k)) > 0


@pytest.mark.parametrize("x", [-1e4, -100.0, -0.0, 0.0, 1e-40, 100.0, 1e4])
def test_amplitudes_of_extreme_inputs(x: float) -> None:
    def amplitude(x: jax.Array) -> jax.Array:
        table = rotary_table(jnp.zeros((1, 1)), jnp.ones(1))
        return pope_queries_and_keys(x, x, *table, jnp.zeros(1))[0][..., 0].sum()

    value, gradient = jax.value_and_grad(amplitude)(jnp.full((1, 1, 1, 1), x))
    assert value == pytest.approx(np.logaddexp(x, 0.0), rel=1e-6, abs=1e-38)
    np.testing.assert_allclose(gradient, 0.5 * (1 + np.tanh(x / 2)), rtol=1e-5, atol=1e-7)
