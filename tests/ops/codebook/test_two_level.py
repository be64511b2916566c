"""Two-level codes against their definition in float64."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import reference, two_level

V, K, D = 103, 9, 6


def assignment() -> np.ndarray:
    """Code 8 is empty, code 7 has one token."""
    codes = np.random.default_rng(0).integers(7, size=V)
    codes[50] = 7
    return codes


R = 25  # The largest code has 22 tokens or so.
LEVELS = two_level.levels(assignment(), K, R)


def make(dtype: Any, bias: bool = True) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)
    num_ranks = LEVELS.tokens.shape[1]

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    # Empty codes get no probability: -1e9 is no infinity, so that gradients stay finite.
    code_bias = jnp.where(jnp.arange(K) == 8, -1e9, normal(K).astype(jnp.float32))
    weights = two_level.Weights(
        normal(K, D),
        normal(K, D),
        normal(num_ranks, D),
        code_bias,
        normal(V).astype(jnp.float32) if bias else None,
    )
    h = normal(5, 4, D)
    targets = jnp.asarray(rng.integers(V, size=(5, 4))).at[0, 0].set(50)
    return h, weights, targets


def of_definition(h: Any, weights: Any, targets: Any) -> Any:
    bias = jnp.zeros(V, h.dtype) if weights.bias is None else weights.bias
    log_p = reference.two_level_log_probs(h, *weights[:4], bias, LEVELS.codes, LEVELS.ranks)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], log_p


def fast(h: Any, weights: Any, targets: Any) -> Any:
    nll = two_level.nll(h, weights, LEVELS, targets)
    return nll, two_level.log_probs(h, weights, LEVELS)


def gradients(function: Any) -> Any:
    def run(h: Any, weights: Any, targets: Any) -> Any:
        return jax.grad(lambda h, w: jnp.sum(function(h, w, targets)[0]), (0, 1))(h, weights)

    return run


def test_levels() -> None:
    codes, ranks, tokens = map(np.asarray, LEVELS)
    np.testing.assert_array_equal(tokens[codes, ranks], np.arange(V))
    assert np.sum(tokens >= 0) == V
    np.testing.assert_array_equal(np.sum(tokens >= 0, axis=1), np.bincount(assignment(), None, K))


def test_too_few_ranks() -> None:
    largest = np.bincount(assignment()).max()
    with pytest.raises(UserError, match=f"num_ranks=5: must be at least {largest}"):
        two_level.levels(assignment(), K, 5)


def test_ranks_follow_the_order() -> None:
    order = np.random.default_rng(2).permutation(V)
    levels = two_level.levels(assignment(), K, R, order)
    place = np.argsort(order)
    for row in np.asarray(levels.tokens):
        assert np.all(np.diff(place[row[row >= 0]]) > 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_definition(bias: bool, dtype: Any, in_float64: Any, max_error: Any) -> None:
    inputs = make(dtype, bias)
    values = jax.jit(fast)(*inputs)
    expected = in_float64(of_definition, *inputs)
    # Gates and hidden states are multiplied in bfloat16, an error of 2^-8 of products up to 20.
    atol = 0.1 if dtype == jnp.bfloat16 else 1e-5
    chex.assert_trees_all_close(values, expected, rtol=1e-5, atol=atol)
    actual = jax.jit(gradients(fast))(*inputs)
    true = in_float64(gradients(of_definition), *inputs)
    for a, t in zip(jax.tree.leaves(actual), jax.tree.leaves(true), strict=True):
        assert max_error(a, t) <= (3 * 2.0**-7 if dtype == jnp.bfloat16 else 1e-5)


def test_probabilities_add_up() -> None:
    h, weights, _ = make(jnp.float32)
    total = np.exp(np.float64(two_level.log_probs(h, weights, LEVELS))).sum(axis=-1)
    np.testing.assert_allclose(total, 1, rtol=1e-5)
