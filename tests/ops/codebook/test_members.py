"""The TPU kernel of the loss within classes, in Pallas's interpreter, against gathers."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from class_cases import make_weights, normal
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.codebook import classes
from vqcx_jax.ops.codebook.members import tpu, xla
from vqcx_jax.ops.codebook.members.xla import code_logits

V, C, M, K, D = 500, 9, 3, 20, 6


def class_of() -> np.ndarray:
    """Class 8 has one token, class 7 has 200, more than lanes; ten tokens are frequent."""
    rng = np.random.default_rng(0)
    found = np.append(np.arange(9), rng.integers(7, size=V - 9)).astype(np.int32)
    found[rng.choice(np.arange(9, V), 200, replace=False)] = 7
    found[rng.choice(np.arange(9, V), 10, replace=False)] = -1
    return found


CLASSES = classes.arrange(class_of(), C)


def make(targets: str, bias: bool = True, scale: bool = True) -> tuple[Any, ...]:
    """h, weights, classes and ranks of targets that are anywhere, in one class, or frequent."""
    rng = np.random.default_rng(1)
    weights = make_weights(rng, CLASSES, (M, K, D // M), bias, scale)
    choices = {
        "anywhere": np.arange(V),
        "one class": np.flatnonzero(class_of() == 7),
        "frequent": np.flatnonzero(class_of() < 0),
    }
    tokens = jnp.asarray(rng.choice(choices[targets], (7, 11)))
    class_ = CLASSES.entry_of[tokens] - classes.num_frequent(CLASSES)
    h, weight_of_nll = normal(rng, 7, 11, D), normal(rng, 7, 11)
    return h, weights, class_, CLASSES.rank_of[tokens], weight_of_nll


def values_and_gradients(nll: Any, weights: Any) -> Any:
    codes = jax.tree.map(np.asarray, weights.codes)

    def function(h: Any, arrays: Any, class_: Any, rank: Any, g: Any) -> Any:
        def of(h: Any, codebooks: Any, scale: Any, bias: Any) -> Any:
            weights = classes.Weights(codebooks, jax.tree.map(jnp.asarray, codes), scale, bias)
            return nll(h, weights, CLASSES, class_, rank)

        values, vjp = jax.vjp(of, h, *arrays)
        return values, vjp(g.astype(values.dtype))

    return function


def both(inputs: Any, in_float64: Any, **options: Any) -> tuple[Any, Any]:
    h, weights, class_, rank, g = inputs
    arrays = (weights.codebooks, weights.scale, weights.bias)
    options = {"interpret": pltpu.InterpretParams()} | options
    kernel = functools.partial(tpu.nll, **options)
    expected = in_float64(values_and_gradients(xla.nll, weights), h, arrays, class_, rank, g)
    actual = jax.jit(values_and_gradients(kernel, weights))(h, arrays, class_, rank, g)
    return actual, expected


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("targets", ["anywhere", pytest.param("one class", marks=newest_jax)])
def test_equals_gathers(targets: str, scale: bool, in_float64: Any, max_error: Any) -> None:
    actual, expected = both(make(targets, bias=scale, scale=scale), in_float64)
    chex.assert_trees_all_equal_shapes(actual, expected)
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
    for a, e in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        assert max_error(a, e) <= 1e-5


@newest_jax
def test_bfloat16_products(in_float64: Any, max_error: Any) -> None:
    """Within the roundings of M code logits, and of one probability backward."""
    inputs = make("anywhere")
    actual, expected = both(inputs, in_float64, product_dtype="bfloat16")
    tables = code_logits(inputs[0], inputs[1].codebooks)
    largest = float(
        jnp.max(jnp.abs(inputs[1].scale)) * jnp.sum(jnp.max(jnp.abs(tables), (1, 2, 3)))
    )
    chex.assert_trees_all_close(actual[0], expected[0], rtol=0, atol=2.0**-8 * largest)
    for a, e in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        assert max_error(a, e) <= 2.0**-8 * (largest + 1)


@newest_jax
def test_frequent_tokens_have_no_class() -> None:
    """No tile is used at all: losses and gradients are 0, and not what memory happened to hold."""
    h, weights, class_, rank, g = make("frequent")
    kernel = functools.partial(tpu.nll, interpret=pltpu.InterpretParams())
    arrays = (weights.codebooks, weights.scale, weights.bias)
    results = values_and_gradients(kernel, weights)(h, arrays, class_, rank, g)
    assert not any(np.any(x) for x in jax.tree.leaves(results))


def test_nan_stays_at_its_position() -> None:
    h, weights, class_, rank, _ = make("one class")
    kernel = functools.partial(tpu.nll, interpret=pltpu.InterpretParams())
    losses = kernel(h.at[3, 4].set(jnp.nan), weights, CLASSES, class_, rank)
    is_nan = np.zeros((7, 11), bool)
    is_nan[3, 4] = True
    np.testing.assert_array_equal(np.isnan(losses), is_nan)


def test_plain_jax_on_a_cpu() -> None:
    h, weights, *_ = make("anywhere")
    with dispatch.record() as traced:
        classes.nll(h, weights, CLASSES, jnp.zeros((7, 11), jnp.int32))
    assert traced == [("codebook.members.nll", "xla")]
