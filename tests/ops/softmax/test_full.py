"""The full softmax against float64, in values and gradients."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops import softmax

pytestmark = pytest.mark.usefixtures("fully_optimized")  # As users compile it.

CASES: dict[str, dict[str, Any]] = {
    "no_bias": dict(leading=(6,), vocab_size=1009, bias_scale=None),
    "bias": dict(leading=(2, 3), vocab_size=1009, bias_scale=1.0),
    "one_position": dict(leading=(), vocab_size=7, bias_scale=1.0),
    "large_bias": dict(leading=(6,), vocab_size=1009, bias_scale=100.0),
    "large_logits": dict(leading=(6,), vocab_size=1009, bias_scale=1.0, logit_scale=100.0),
}


def make(
    leading: tuple[int, ...],
    vocab_size: int,
    bias_scale: float | None,
    logit_scale: float = 1.0,
    dtype: Any = jnp.float32,
) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    h = jnp.asarray(logit_scale * rng.standard_normal((*leading, 16)), dtype)
    weights = jnp.asarray(rng.standard_normal((vocab_size, 16)) / 4, dtype)
    bias = None
    if bias_scale is not None:
        bias = jnp.asarray(bias_scale * rng.standard_normal(vocab_size), jnp.float32)
    return h, weights, bias, jnp.asarray(rng.integers(vocab_size, size=leading), jnp.int32)


def plain_nll(h: Any, weights: Any, targets: Any, bias: Any) -> Any:
    """The definition; float64 when run in float64."""
    z = h @ weights.T + (0.0 if bias is None else bias)
    log_z = jnp.log(jnp.sum(jnp.exp(z - jnp.max(z, -1, keepdims=True)), -1)) + jnp.max(z, -1)
    return log_z - jnp.take_along_axis(z, targets[..., None], -1)[..., 0], log_z


def values_and_gradients(nll: Callable[..., Any]) -> Callable[..., Any]:
    def function(h: Any, weights: Any, bias: Any, targets: Any) -> Any:
        values, vjp = jax.vjp(lambda h, w, b: nll(h, w, targets, b), h, weights, bias)
        return values, vjp((jnp.ones_like(values[0]), -0.3 * jnp.ones_like(values[1])))

    return function


@pytest.mark.parametrize("name", CASES)
def test_float32_values_and_gradients(name: str, in_float64: Any, max_error: Any) -> None:
    inputs = make(**CASES[name])
    values, gradients = jax.jit(values_and_gradients(softmax.nll))(*inputs)
    true_values, true_gradients = in_float64(values_and_gradients(plain_nll), *inputs)
    # A hundred roundings of float32, for a sum of D products and one of V exponentials.
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for actual, expected in pairs:
        assert max_error(actual, expected) <= 1e-5


def test_bfloat16_inputs(in_float64: Any, max_error: Any) -> None:
    inputs = make((2, 3), 1009, 1.0, dtype=jnp.bfloat16)
    values, gradients = jax.jit(values_and_gradients(softmax.nll))(*inputs)
    true_values, true_gradients = in_float64(values_and_gradients(plain_nll), *inputs)
    # Logits are accumulated and kept in float32, so only the gradients are rounded, once.
    assert [v.dtype for v in values] == [jnp.float32] * 2
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    for actual, expected in zip(gradients, true_gradients, strict=True):
        assert max_error(actual, expected) <= 2.0**-8 + 1e-5


@pytest.mark.parametrize("name", ["no_bias", "bias", "one_position"])
def test_logits(name: str, in_float64: Any) -> None:
    h, weights, bias, _ = make(**CASES[name])
    expected = in_float64(lambda h, w, b: h @ w.T + (0.0 if b is None else b), h, weights, bias)
    actual = jax.jit(softmax.logits)(h, weights, bias)
    assert actual.dtype == jnp.float32
    chex.assert_trees_all_close(actual, expected.astype(np.float32), rtol=0, atol=1e-5)


def test_nan_stays_at_its_position() -> None:
    h, weights, bias, targets = make(**CASES["bias"])
    for output in jax.jit(softmax.nll)(h.at[1, 2, 0].set(jnp.nan), weights, targets, bias):
        np.testing.assert_array_equal(np.isnan(output), [[False] * 3, [False, False, True]])
