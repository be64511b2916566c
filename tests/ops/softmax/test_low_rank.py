"""The low-rank softmax against its definition in float64."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.codebook.reference import nll_of_logits
from vqcx_jax.ops.softmax import low_rank, reference

CASES: dict[str, dict[str, Any]] = {
    "ragged": dict(vocab_size=101, rank=5, leading=(2, 3)),
    "no_bias": dict(vocab_size=101, rank=5, leading=(6,), with_bias=False),
    "capped": dict(vocab_size=101, rank=5, leading=(6,), cap=1.5),
    "rank_one_and_one_position": dict(vocab_size=7, rank=1, leading=()),
}


def make(
    vocab_size: int,
    rank: int,
    leading: tuple[int, ...],
    with_bias: bool = True,
    cap: float | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.standard_normal((*leading, 16)), dtype)
    down = jnp.asarray(rng.standard_normal((rank, 16)) / 4, dtype)
    up = jnp.asarray(rng.standard_normal((vocab_size, rank)), dtype)
    bias = jnp.asarray(rng.standard_normal(vocab_size), jnp.float32) if with_bias else None
    return (h, down, up, bias), jnp.asarray(rng.integers(vocab_size, size=leading)), cap


def with_gradients(nll: Callable[..., Any]) -> Callable[..., Any]:
    def function(operands: Any, targets: Any) -> Any:
        values, vjp = jax.vjp(lambda operands: nll(*operands, targets), operands)
        return values, vjp((jnp.ones_like(values[0]), -0.3 * jnp.ones_like(values[1])))

    return function


def functions(cap: float | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The layer and its definition, of the same arguments."""
    return (
        lambda h, down, up, bias, targets: low_rank.nll(h, down, up, targets, bias, cap=cap),
        lambda h, down, up, bias, targets: nll_of_logits(
            reference.low_rank_logits(h, down, up, bias, cap), targets
        ),
    )


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, in_float64: Any, max_error: Any) -> None:
    operands, targets, cap = make(**CASES[name])
    nll, definition = functions(cap)
    values, gradients = jax.jit(with_gradients(nll))(operands, targets)
    true_values, true_gradients = in_float64(with_gradients(definition), operands, targets)
    chex.assert_trees_all_close(values, true_values, rtol=1e-5, atol=1e-6)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for actual, expected in pairs:
        assert max_error(actual, expected) <= 1e-5
    logits = jax.jit(lambda h, d, u, b: low_rank.logits(h, d, u, b, cap=cap))(*operands)
    expected = in_float64(lambda h, d, u, b: reference.low_rank_logits(h, d, u, b, cap), *operands)
    chex.assert_trees_all_close(logits, np.float32(expected), rtol=1e-5, atol=1e-5)


def test_bfloat16(in_float64: Any, assert_as_good_as: Any) -> None:
    # So many positions that the largest error of either is no matter of luck.
    case = dict(CASES["capped"], leading=(200,))
    operands, targets, cap = make(**case, dtype=jnp.bfloat16)
    nll, definition = functions(cap)
    actual = jax.jit(with_gradients(nll))(operands, targets)
    values, (gradients,) = actual
    chex.assert_type(values, jnp.float32)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 3 + [jnp.float32]
    plain = jax.jit(with_gradients(definition))(operands, targets)
    assert_as_good_as(plain, actual, in_float64(with_gradients(definition), operands, targets))
