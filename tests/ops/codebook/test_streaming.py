"""The streamed loss of any number of codebooks against its definition."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from multi_cases import CASES, Case, assert_equal_definition, loss_from_h, make, nll_of
from versions import oldest_jax

from vqcx_jax.ops.codebook import bilinear, streaming

pytestmark = oldest_jax

MORE_CASES = {
    "one_codebook": Case(1009, (37,)),
    "three": Case(1009, (7, 20, 13)),
    "four_x100": Case(1009, (16, 16, 16, 16), logit_scale=100.0),
    "sixteen_product": Case(1009, (8,) * 16, "product", dim=32),
    "many_positions": Case(1009, (7, 20, 13), leading=(2, 1100)),  # Eight blocks, one ragged.
}
ALL_CASES = CASES | MORE_CASES
streamed_nll = nll_of(streaming.log_z)


@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_float32(case: Case, in_float64: Any, max_error: Any) -> None:
    assert_equal_definition(streamed_nll, case, jnp.float32, in_float64, max_error)


@pytest.mark.parametrize("name", ["three", "sixteen_product"])
def test_bfloat16(name: str, in_float64: Any, max_error: Any) -> None:
    case = ALL_CASES[name]
    assert_equal_definition(streamed_nll, case, jnp.bfloat16, in_float64, max_error)


def test_equals_bilinear() -> None:
    x = make(CASES["ragged"])
    args = (x.h, x.codebooks, x.bias, x.assignment, x.targets)
    streamed, closed = (loss_from_h(p, "additive")(*args) for p in (streamed_nll, bilinear.nll))
    chex.assert_trees_all_close(streamed, closed, rtol=1e-6)


@pytest.mark.parametrize("num_banned", [1, 300, 1008])
def test_tokens_with_bias_minus_infinity_are_impossible(num_banned: int) -> None:
    """Whole blocks of them too: the running maximum is then -inf."""
    x = make(MORE_CASES["many_positions"])
    banned = jnp.arange(1009) < num_banned
    bias = jnp.where(banned, -jnp.inf, jnp.asarray(x.bias))
    targets = jnp.full(x.targets.shape, 1008)

    def loss(h: jax.Array, codebooks: Any, bias: jax.Array) -> jax.Array:
        loss = loss_from_h(streamed_nll, "additive")
        return jnp.sum(loss(h, codebooks, bias, x.assignment, targets)[0])

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x.h, x.codebooks, bias)
    chex.assert_tree_all_finite((value, gradients))
    assert not np.any(gradients[2][banned])
    if num_banned == 1008:  # One token is left, and is certain.
        assert abs(value) <= 1e-6 * targets.size


def test_nan_stays_at_its_position() -> None:
    x = make(MORE_CASES["three"])
    h = x.h.at[3, 0].set(jnp.nan)

    def loss(h: jax.Array) -> Any:
        return loss_from_h(streamed_nll, "additive")(
            h, x.codebooks, x.bias, x.assignment, x.targets
        )

    values, vjp = jax.vjp(loss, h)
    (d_h,) = vjp(tuple(map(jnp.ones_like, values)))
    for output in (*values, jnp.sum(d_h, axis=1)):
        np.testing.assert_array_equal(np.isnan(output), np.arange(6) == 3)


def test_vmap_equals_leading_axes() -> None:
    x = make(MORE_CASES["three"])
    loss = loss_from_h(streamed_nll, "additive")

    def value_and_gradients(h: Any, targets: Any) -> Any:
        values, vjp = jax.vjp(
            lambda h, b: loss(h, x.codebooks, b, x.assignment, targets), h, x.bias
        )
        return values, vjp(tuple(map(jnp.ones_like, values)))

    values, (d_h, d_bias) = jax.jit(jax.vmap(value_and_gradients))(x.h, x.targets)
    whole = jax.jit(value_and_gradients)(x.h, x.targets)
    chex.assert_trees_all_close((values, (d_h, d_bias.sum(0))), whole, rtol=1e-5, atol=1e-6)
