"""Capped losses against the definition, in float64, in values and gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops import codebook, softmax
from vqcx_jax.ops.codebook import reference
from vqcx_jax.ops.soft_cap import soft_cap

CAP = 5.0
VOCAB, CODES, DIM = 101, 13, 16


def full_reference(h: Any, weights: Any, targets: Any, bias: Any = None) -> Any:
    z = CAP * jnp.tanh(reference.logits(h, weights, jnp.arange(VOCAB)) / CAP)
    return reference.nll_of_logits(z if bias is None else z + bias, targets)


def codebook_reference(h: Any, codes: Any, assignment: Any, targets: Any, bias: Any = None) -> Any:
    return full_reference(h, codes[assignment], targets, bias)


def make(kind: str, token_bias: bool, dtype: Any) -> tuple[list[jax.Array], list[int]]:
    """Arguments of the losses, and which of them are differentiated. Products reach 4 CAP."""
    rng = np.random.default_rng(0)
    rows = CODES if kind == "vq" else VOCAB
    arguments = [jnp.asarray(3 * rng.standard_normal(s), dtype) for s in ((4, 6, DIM), (rows, DIM))]
    if kind == "vq":
        arguments.append(jnp.asarray(rng.integers(CODES - 1, size=VOCAB)))  # The last is empty.
    arguments.append(jnp.asarray(rng.integers(VOCAB, size=(4, 6))))
    if token_bias:
        arguments.append(jnp.asarray(rng.standard_normal(VOCAB), jnp.float32))
    return arguments, [i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]


LOSSES: dict[str, tuple[Any, Any]] = {
    "vq": (codebook.nll, codebook_reference),
    "full": (softmax.nll, full_reference),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("token_bias", [True, False])
@pytest.mark.parametrize("kind", LOSSES)
def test_capped_nll(
    kind: str,
    token_bias: bool,
    dtype: Any,
    in_float64: Callable[..., Any],
    max_error: Callable[..., float],
) -> None:
    nll, expected_nll = LOSSES[kind]
    arguments, floats = make(kind, token_bias, dtype)

    def values_and_gradients(nll: Any, *arguments: Any) -> Any:
        def total(*arguments: Any) -> Any:
            nll_BxT, log_z_BxT = nll(*arguments)
            return jnp.sum(nll_BxT + 0.1 * log_z_BxT**2), (nll_BxT, log_z_BxT)

        return jax.grad(total, floats, has_aux=True)(*arguments)

    gradients, values = jax.jit(lambda *a: values_and_gradients(lambda *b: nll(*b, cap=CAP), *a))(
        *arguments
    )
    exact_gradients, exact_values = in_float64(
        lambda *a: values_and_gradients(expected_nll, *a), *arguments
    )
    for actual, exact in zip(values, exact_values, strict=True):
        assert max_error(actual, exact) < 2e-6
    for i, actual, exact in zip(floats, gradients, exact_gradients, strict=True):
        assert actual.dtype == arguments[i].dtype
        # Twice the rounding of the narrowest dtype on the way, the bias seeing float32 alone.
        assert max_error(actual, exact) < (1e-2 if actual.dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_cap_that_is_far_away_changes_nothing(kind: str, max_error: Callable[..., float]) -> None:
    arguments, _ = make(kind, True, jnp.float32)
    uncapped = {"vq": codebook.nll, "full": softmax.nll}[kind](*arguments)
    capped = LOSSES[kind][0](*arguments, cap=1e6)
    for a, b in zip(capped, uncapped, strict=True):
        assert max_error(a, np.asarray(b, np.float64)) < 1e-6


def test_soft_cap() -> None:
    x = jnp.asarray([-1e9, -1.0, 0.0, 1e-3, 1e9])
    np.testing.assert_allclose(
        soft_cap(x, 2.0), [-2.0, -2 * np.tanh(0.5), 0.0, 1e-3, 2.0], rtol=1e-6
    )
    assert soft_cap(x, None) is x
