"""The product of hidden states and weights, and what its gradients multiply."""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.codebook import closed_form
from vqcx_jax.ops.product import product

CASES = {
    "...d,vd->...v": ((2, 3, 5), (7, 5)),
    "...md,mkd->m...k": ((2, 3, 4, 5), (4, 7, 5)),
}


def operands(subscripts: str, dtype: Any) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    h, weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in CASES[subscripts])
    return h, weights


def summed(function: Any) -> Any:
    return jax.value_and_grad(lambda h, weights: jnp.sum(jnp.sin(function(h, weights))), (0, 1))


@pytest.mark.parametrize("subscripts", CASES)
def test_equals_einsum(subscripts: str, in_float64: Any) -> None:
    args = operands(subscripts, jnp.float32)
    actual = summed(functools.partial(product, subscripts=subscripts))(*args)
    expected = in_float64(summed(functools.partial(jnp.einsum, subscripts)), *args)
    chex.assert_trees_all_close(actual, jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subscripts", CASES)
def test_bfloat16_is_summed_in_float32_and_multiplied_as_bfloat16(subscripts: str) -> None:
    """A float32 cotangent would have XLA widen the products of the backward pass."""
    args = operands(subscripts, jnp.bfloat16)
    function = functools.partial(product, subscripts=subscripts)
    assert function(*args).dtype == jnp.float32
    _, gradients = summed(function)(*args)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    assert_bfloat16_operands(summed(function), *args)


def test_loss_of_one_codebook_multiplies_bfloat16() -> None:
    h, codes = operands("...d,vd->...v", jnp.bfloat16)
    assignment, targets = jnp.arange(20) % len(codes), jnp.ones(h.shape[:-1], jnp.int32)

    def nll(h: jax.Array, codes: jax.Array) -> jax.Array:
        return closed_form.nll(h, codes, assignment, targets, jnp.zeros(20))[0]

    assert_bfloat16_operands(summed(nll), h, codes)


def assert_bfloat16_operands(function: Any, *args: jax.Array) -> None:
    products = [e for e in equations(jax.make_jaxpr(function)(*args).jaxpr) if is_product(e)]
    assert len(products) >= 3
    for equation in products:
        assert [operand.aval.dtype for operand in equation.invars] == [jnp.bfloat16] * 2


def is_product(equation: Any) -> bool:
    return equation.primitive.name == "dot_general"


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
