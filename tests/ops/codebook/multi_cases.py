"""Several codebooks of every shape, and how a loss made of them is compared with its definition."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from vqcx_jax.ops.codebook import multi, reference

FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "additive": (multi.additive_code_logits, reference.additive_logits),
    "product": (multi.product_code_logits, reference.product_logits),
}


class Case(NamedTuple):
    vocab_size: int
    num_codes: tuple[int, ...]
    form: str = "additive"
    dim: int = 16
    leading: tuple[int, ...] = (6,)
    used_codes: int | None = None  # Of each codebook; None: all of them. The others stay empty.
    one_token_a_cell: bool = False
    bias_scale: float | None = 1.0
    logit_scale: float = 1.0


CASES = {
    "smallest": Case(7, (3, 2), dim=4, leading=()),
    "one_cell": Case(7, (1, 1), leading=(2, 3)),
    "ragged": Case(1009, (37, 20), leading=(3, 5)),
    "ragged_product": Case(1009, (20, 37), "product", leading=(3, 5)),
    "one_token_a_cell": Case(13 * 31, (13, 31), one_token_a_cell=True, bias_scale=None),
    "many_tokens_a_cell": Case(1009, (5, 4)),
    "empty_codes": Case(300, (64, 50), used_codes=20),
    "large_vocabulary": Case(50_257, (225, 224)),
    "logits_x30": Case(300, (64, 50), logit_scale=30.0),
    "logits_x100": Case(300, (64, 50), logit_scale=100.0),
    "large_bias": Case(1009, (37, 20), bias_scale=100.0),
}


class Inputs(NamedTuple):
    h: jax.Array
    codebooks: tuple[jax.Array, ...]
    bias: jax.Array | None
    assignment: jax.Array
    targets: jax.Array
    weights: tuple[jax.Array, ...]  # Cotangents of nll and log_z.


def make(case: Case, dtype: Any = jnp.float32) -> Inputs:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    if case.one_token_a_cell:
        cells = rng.permutation(np.prod(case.num_codes))[: case.vocab_size]
        assignment = np.stack(np.unravel_index(cells, case.num_codes), axis=1)
    else:
        used = [rng.permutation(k)[: case.used_codes] for k in case.num_codes]
        assignment = np.stack([rng.choice(codes, case.vocab_size) for codes in used], axis=1)
    bias = None
    if case.bias_scale is not None:
        bias = jnp.asarray(case.bias_scale * normal(case.vocab_size), jnp.float32)
    width = case.dim if case.form == "additive" else case.dim // len(case.num_codes)
    return Inputs(
        h=jnp.asarray(case.logit_scale * normal((*case.leading, case.dim)), dtype),
        codebooks=tuple(
            jnp.asarray(normal((k, width)) / case.dim**0.5, dtype) for k in case.num_codes
        ),
        bias=bias,
        assignment=jnp.asarray(assignment, jnp.int32),
        targets=jnp.asarray(rng.integers(case.vocab_size, size=case.leading), jnp.int32),
        weights=tuple(jnp.asarray(normal(case.leading), jnp.float32) for _ in range(2)),
    )


def nll_of(log_z: Callable[..., Any]) -> Callable[..., Any]:
    """(code_logits, assignment, targets, bias) -> (nll, log_z), of a function that gives log Z."""

    def nll(code_logits: Any, assignment: Any, targets: Any, bias: Any = None) -> Any:
        z = log_z(code_logits, assignment, bias)
        return z - multi.target_logits(code_logits, assignment, targets, bias), z

    return nll


def loss_from_h(nll: Callable[..., Any], form: str) -> Callable[..., Any]:
    """(h, codebooks, bias, assignment, targets) -> (nll, log_z)."""
    code_logits, _ = FORMS[form]

    def function(h: Any, codebooks: Any, bias: Any, assignment: Any, targets: Any) -> Any:
        return nll(code_logits(h, codebooks), assignment, targets, bias)

    return function


def definition(form: str) -> Callable[..., Any]:
    """The same, as the formula reads."""
    _, logits = FORMS[form]

    def function(h: Any, codebooks: Any, bias: Any, assignment: Any, targets: Any) -> Any:
        return reference.nll_of_logits(logits(h, codebooks, assignment, bias), targets)

    return function


def values_and_gradients(loss: Callable[..., Any]) -> Callable[..., Any]:
    """(nll, log_z) and the gradients of their weighted sum by h, codebooks and bias."""

    def function(x: Inputs) -> Any:
        values, vjp = jax.vjp(
            lambda h, codebooks, bias: loss(h, codebooks, bias, x.assignment, x.targets), *x[:3]
        )
        cotangents = [w.astype(v.dtype) for w, v in zip(x.weights, values, strict=True)]
        return values, vjp(tuple(cotangents))

    return function


@cache
def true_values_and_gradients(case: Case, dtype: Any, in_float64: Callable[..., Any]) -> Any:
    return in_float64(values_and_gradients(definition(case.form)), make(case, dtype))


def assert_equal_definition(
    nll: Callable[..., Any], case: Case, dtype: Any, in_float64: Any, max_error: Any
) -> None:
    """Values to 1e-5 of themselves; gradients to 1e-5 of the largest.

    1e-5 is a hundred roundings of float32, for sums of dim products and of V exponentials.
    Gradients in bfloat16 have at most twice the error of the definition's in bfloat16.
    """
    inputs = make(case, dtype)
    values, gradients = jax.jit(values_and_gradients(loss_from_h(nll, case.form)))(inputs)
    expected = true_values_and_gradients(case, dtype, in_float64)
    chex.assert_shape(values, case.leading)
    assert [v.dtype for v in values] == [jnp.float32] * 2
    chex.assert_trees_all_close(values, expected[0], rtol=1e-5)
    plain = expected[1]
    if dtype == jnp.bfloat16:
        _, plain = jax.jit(values_and_gradients(definition(case.form)))(inputs)
    of_inputs = (jax.tree.leaves(tree) for tree in (inputs[:3], gradients, expected[1], plain))
    for x, actual, true, naive in zip(*of_inputs, strict=True):
        assert actual.dtype == x.dtype
        error_of_bfloat16 = max_error(naive, true) if x.dtype == jnp.bfloat16 else 0.0
        assert max_error(actual, true) <= 1e-5 + 2 * error_of_bfloat16
