"""RMS norm of queries and keys over the head width."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention import qk_norm


def test_is_of_unit_mean_square_times_scale() -> None:
    x = 30 * jax.random.normal(jax.random.key(0), (2, 3, 4, 16))
    scale = jnp.linspace(0.5, 2.0, 16)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True)) * np.asarray(scale)
    chex.assert_trees_all_close(qk_norm(x, scale), expected, rtol=1e-5)
    each_head = jnp.broadcast_to(scale, (4, 16))
    chex.assert_trees_all_equal(qk_norm(x, each_head), qk_norm(x, scale))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e-20])
def test_tiny_vectors(value: float, dtype: Any) -> None:
    """Theirs is a division by sqrt(epsilon) = 1e-3."""
    x = jnp.full((1, 4), value, dtype)
    y, vjp = jax.vjp(lambda x: qk_norm(x, jnp.ones(4)), x)
    (by_x,) = vjp(jnp.ones_like(y))
    assert y.dtype == by_x.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), 1e3 * x.astype(jnp.float32), 1e-2, 1e-37)
    np.testing.assert_allclose(by_x.astype(jnp.float32), 1e3, rtol=1e-2)


def test_bfloat16_is_rounded_once() -> None:
    x = jax.random.normal(jax.random.key(0), (3, 2, 8)).astype(jnp.bfloat16)
    scale = jnp.linspace(0.5, 2.0, 8)
    wide = qk_norm(x.astype(jnp.float32), scale)
    chex.assert_trees_all_equal(qk_norm(x, scale), wide.astype(jnp.bfloat16))
