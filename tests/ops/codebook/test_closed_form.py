"""The closed form of VQ-Logits against its definition, in values and gradients."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.test_util import check_grads
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import codebook, softmax
from vqcx_jax.ops.codebook import reference

# As users compile it.
pytestmark = [oldest_jax, pytest.mark.usefixtures("fully_optimized")]


class Case(NamedTuple):
    vocab_size: int
    num_codes: int
    dim: int = 16
    leading: tuple[int, ...] = (6,)
    used_codes: int | None = None  # None: all of them; else the others stay empty.
    bias_scale: float | None = 1.0
    logit_scale: float = 1.0


CASES = {
    "smallest": Case(7, 3, dim=5, leading=()),
    "one_code": Case(7, 1, leading=(2, 3)),
    "one_token_a_code": Case(31, 31, leading=(2, 3)),
    "ragged": Case(1009, 37, leading=(3, 5)),
    "ragged_no_bias": Case(1009, 37, bias_scale=None),
    "empty_codes": Case(300, 64, used_codes=20),
    "empty_codes_no_bias": Case(300, 64, used_codes=20, bias_scale=None),
    "large_vocabulary": Case(50_257, 503),
    "large_logits": Case(1009, 37, logit_scale=100.0),
    "large_bias": Case(1009, 37, bias_scale=100.0),
}


class Inputs(NamedTuple):
    h: jax.Array
    codes: jax.Array
    bias: jax.Array | None
    assignment: jax.Array
    targets: jax.Array
    weights: tuple[jax.Array, ...]  # Cotangents of nll and log_z.


def make(case: Case, dtype: Any = jnp.float32) -> Inputs:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    # Every used code has a token; the number of tokens a code has is otherwise random.
    used = rng.permutation(case.num_codes)[: case.used_codes]
    more = rng.choice(used, case.vocab_size - len(used))
    assignment = rng.permutation(np.concatenate([used, more]))
    bias = None
    if case.bias_scale is not None:
        bias = jnp.asarray(case.bias_scale * normal(case.vocab_size), jnp.float32)
    return Inputs(
        h=jnp.asarray(case.logit_scale * normal((*case.leading, case.dim)), dtype),
        codes=jnp.asarray(normal((case.num_codes, case.dim)) / case.dim**0.5, dtype),
        bias=bias,
        assignment=jnp.asarray(assignment, jnp.int32),
        targets=jnp.asarray(rng.integers(case.vocab_size, size=case.leading), jnp.int32),
        weights=tuple(jnp.asarray(normal(case.leading), jnp.float32) for _ in range(2)),
    )


def values_and_gradients(nll: Callable[..., Any]) -> Callable[..., Any]:
    """(nll, log_z) and the gradients of their weighted sum by h, codes and bias."""

    def function(inputs: Inputs) -> Any:
        def outputs(h: jax.Array, codes: jax.Array, bias: jax.Array | None) -> Any:
            return nll(h, codes, inputs.assignment, inputs.targets, bias)

        values, vjp = jax.vjp(outputs, inputs.h, inputs.codes, inputs.bias)
        cotangents = [w.astype(v.dtype) for w, v in zip(inputs.weights, values, strict=True)]
        return values, vjp(tuple(cotangents))

    return function


nll = jax.jit(codebook.nll)
logits = jax.jit(codebook.logits)
closed_form = jax.jit(values_and_gradients(codebook.nll))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32_values_and_gradients(case: Case, in_float64: Any, max_error: Any) -> None:
    inputs = make(case)
    values, gradients = closed_form(inputs)
    chex.assert_shape(values, case.leading)
    true_values, true_gradients = in_float64(values_and_gradients(reference.nll), inputs)
    # A hundred roundings of float32, for a sum of dim products and one of num_codes exponentials.
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == jnp.float32
        assert max_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("name", ["ragged", "empty_codes", "large_vocabulary", "large_logits"])
def test_bfloat16_inputs(name: str, in_float64: Any, max_error: Any) -> None:
    case = CASES[name]
    inputs = make(case, jnp.bfloat16)
    values, gradients = closed_form(inputs)
    true_values, true_gradients = in_float64(values_and_gradients(reference.nll), inputs)
    # Products of bfloat16 numbers are exact in float32, and nothing is rounded to bfloat16 before
    # the loss: the values are as good as from float32 inputs.
    assert [v.dtype for v in values] == [jnp.float32] * 2
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert max_error(gradients[2], true_gradients[2]) <= 1e-5
    # Gradients by h and codes are products of bfloat16, as the definition's in bfloat16 are.
    _, plain = jax.jit(values_and_gradients(reference.nll))(inputs)
    for actual, naive, expected in zip(gradients, plain, true_gradients, strict=True):
        assert max_error(actual, expected) <= 2 * max_error(naive, expected)


@pytest.mark.parametrize("name", ["smallest", "ragged", "ragged_no_bias", "empty_codes"])
def test_logits_equal_reference(name: str, in_float64: Any) -> None:
    x = make(CASES[name])
    expected = in_float64(reference.logits, x.h, x.codes, x.assignment, x.bias)
    actual = logits(x.h, x.codes, x.assignment, x.bias)
    assert actual.dtype == jnp.float32
    chex.assert_trees_all_close(actual, expected.astype(np.float32), rtol=0, atol=1e-5)


def test_logits_of_bfloat16_are_not_rounded() -> None:
    x = make(CASES["ragged"], jnp.bfloat16)
    h, codes = x.h.astype(jnp.float32), x.codes.astype(jnp.float32)
    wide = logits(h, codes, x.assignment, x.bias)
    actual = logits(x.h, x.codes, x.assignment, x.bias)
    chex.assert_trees_all_close(actual, wide, rtol=0, atol=1e-5)


def test_nll_is_softmax_of_logits() -> None:
    x = make(CASES["ragged"])
    log_p = scipy.special.log_softmax(logits(x.h, x.codes, x.assignment, x.bias), axis=-1)
    expected = -np.take_along_axis(log_p, np.asarray(x.targets)[..., None], axis=-1)[..., 0]
    actual, _ = nll(x.h, x.codes, x.assignment, x.targets, x.bias)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
def test_code_log_mass(has_bias: bool) -> None:
    x = make(CASES["empty_codes"])
    bias = np.asarray(x.bias, np.float64) if has_bias else np.zeros(len(x.assignment))
    of_code = [bias[np.asarray(x.assignment) == k] for k in range(64)]
    expected = [scipy.special.logsumexp(b) if len(b) else -np.inf for b in of_code]
    actual = codebook.code_log_mass(x.assignment, 64, x.bias if has_bias else None)
    chex.assert_trees_all_close(actual, np.asarray(expected, np.float32), rtol=1e-6, atol=1e-6)


def test_tokens_with_bias_minus_infinity_are_impossible() -> None:
    """One token of code 0 and every token of code 1: their probability and gradient are zero."""
    x = make(Case(12, 3))
    assignment = jnp.arange(12) % 3
    banned = (jnp.arange(12) == 0) | (assignment == 1)
    bias = jnp.where(banned, -jnp.inf, jnp.asarray(x.bias))
    targets = jnp.full((6,), 2)

    def loss(h: jax.Array, codes: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(codebook.nll(h, codes, assignment, targets, bias)[0])

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x.h, x.codes, bias)
    chex.assert_tree_all_finite((value, gradients))
    assert not np.any(gradients[2][banned])
    chex.assert_trees_all_close(
        nll(x.h, x.codes, assignment, targets, bias),
        jax.jit(reference.nll)(x.h, x.codes, assignment, targets, bias),
        rtol=1e-5,
    )


def sums_and_gradients(summed_nll: Callable[..., Any]) -> Callable[..., Any]:
    """(loss, nll) of every second position, and gradients of the loss."""

    def function(inputs: Inputs) -> Any:
        counts = jnp.arange(inputs.targets.size).reshape(inputs.targets.shape) % 2 == 0

        def outputs(h: jax.Array, codes: jax.Array, bias: jax.Array | None) -> Any:
            return summed_nll(h, codes, inputs.assignment, inputs.targets, counts, bias, 0.1)

        loss, vjp, nll = jax.vjp(outputs, inputs.h, inputs.codes, inputs.bias, has_aux=True)
        return (loss, nll), vjp(jnp.ones_like(loss))

    return function


def summed_reference(
    h: Any, codes: Any, assignment: Any, targets: Any, counts: Any, bias: Any, z_loss: float
) -> Any:
    nll, log_z = reference.nll(h, codes, assignment, targets, bias)
    total = jnp.sum(nll, where=counts)
    return total + z_loss * jnp.sum(log_z**2, where=counts), total


@pytest.mark.parametrize(
    ("name", "token_block", "dtype"),
    [
        ("smallest", 3, jnp.float32),
        ("ragged", 4, jnp.float32),
        ("ragged_no_bias", 1, jnp.float32),
        ("empty_codes", 4, jnp.bfloat16),
    ],
)
def test_sums_in_blocks_of_positions(
    name: str, token_block: int, dtype: Any, in_float64: Any, assert_as_good_as: Any
) -> None:
    x = make(CASES[name], dtype)
    in_blocks = partial(codebook.summed_nll, token_block=token_block)
    values, gradients = jax.jit(sums_and_gradients(in_blocks))(x)
    true_values, true_gradients = in_float64(sums_and_gradients(summed_reference), x)
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    plain = true_gradients  # For float32, where the limit is 1e-5 of the largest number.
    if dtype == jnp.bfloat16:
        plain = jax.jit(sums_and_gradients(summed_reference))(x)[1]
    assert_as_good_as(plain, gradients, true_gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, (x.h, x.codes, x.bias))


def test_memory_of_blocks() -> None:
    """At the sizes of benchmarks/output_layer.py 1/43 of a full softmax's, as users compile it.

    With the compiler flags of tests on the oldest jax 1/36.
    """

    def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def temporary_bytes(summed_nll: Callable[..., Any], num_rows: int, *others: Any) -> int:
        step = jax.value_and_grad(summed_nll, (0, 1, 2), has_aux=True)
        args = shape(num_positions, 256), shape(num_rows, 256), shape(50_257), *others
        return int(jax.jit(step).lower(*args).compile().memory_analysis().temp_size_in_bytes)

    def of_full(h: Any, weights: Any, bias: Any, targets: Any, counts: Any) -> Any:
        return softmax.summed_nll(h, weights, targets, counts, bias)

    def of_codes(h: Any, codes: Any, bias: Any, *others: Any, **options: Any) -> Any:
        targets, counts, assignment = others
        return codebook.summed_nll(h, codes, assignment, targets, counts, bias, **options)

    num_positions = 512
    labels = shape(num_positions, dtype=jnp.int32), shape(num_positions, dtype=bool)
    full = temporary_bytes(of_full, 50_257, *labels)
    assignment = shape(50_257, dtype=jnp.int32)
    in_blocks = partial(of_codes, token_block=64)
    assert 30 * temporary_bytes(in_blocks, 503, *labels, assignment) <= full
    assert 30 * temporary_bytes(of_codes, 503, *labels, assignment) > full


def test_derivatives_of_log_mass() -> None:
    """The first and second, forward and reverse, against finite differences."""
    rng = np.random.default_rng(0)
    assignment = jnp.asarray([0, 0, 1, 3, 3, 3])  # Code 2 is empty.
    weights = jnp.asarray(rng.standard_normal(4)).at[2].set(0.0)

    def function(bias: jax.Array) -> jax.Array:
        s = codebook.code_log_mass(assignment, 4, bias)
        return jnp.sum(jnp.where(jnp.isfinite(s), weights * s**2, 0.0))

    bias = jnp.asarray(rng.standard_normal(6), jnp.float32)
    check_grads(function, (bias,), order=2, atol=0.02, rtol=0.02, eps=1e-2)


@pytest.mark.parametrize("has_bias", [True, False])
def test_nan_stays_at_its_position(has_bias: bool) -> None:
    x = make(CASES["ragged"])
    bias = x.bias if has_bias else None
    outputs = nll(x.h.at[1, 2, 0].set(jnp.nan), x.codes, x.assignment, x.targets, bias)
    expected = np.zeros((3, 5), bool)
    expected[1, 2] = True
    for output in outputs:
        np.testing.assert_array_equal(np.isnan(output), expected)


def test_vmap_equals_leading_axes() -> None:
    x = make(CASES["ragged"])

    def of_position(h: jax.Array, target: jax.Array) -> Any:
        return codebook.nll(h, x.codes, x.assignment, target, x.bias)

    whole = nll(x.h, x.codes, x.assignment, x.targets, x.bias)
    mapped = jax.jit(jax.vmap(jax.vmap(of_position)))(x.h, x.targets)
    chex.assert_trees_all_close(mapped, whole, rtol=1e-6)
    one = jax.jit(of_position)(x.h[2, 4], x.targets[2, 4])
    chex.assert_trees_all_close(one, jax.tree.map(lambda y: y[2, 4], whole), rtol=1e-6)


def test_no_array_of_logits_over_the_vocabulary() -> None:
    """Loss and gradients hold V or N K numbers, never N V."""
    inputs = make(Case(1000, 10, leading=(64,)))

    def largest_array(function: Callable[..., Any]) -> int:
        equations = _equations(jax.make_jaxpr(values_and_gradients(function))(inputs).jaxpr)
        return max(array.aval.size for equation in equations for array in equation.outvars)

    assert largest_array(codebook.nll) <= max(1000, 64 * 16)
    assert largest_array(reference.nll) >= 64 * 1000


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": jnp.asarray([1000])}, "targets hold 1000: must be in 0 .. 999"),
        ({"targets": jnp.asarray([-100])}, "targets hold -100: must be in 0 .. 999"),
        ({"targets": jnp.asarray([1.0])}, "targets have dtype float32; they must be integers"),
        ({"targets": jnp.asarray(3)}, r"targets has shape \(\); it must be \(1,\)"),
        ({"counts": jnp.ones((1, 1), bool)}, r"counts has shape \(1, 1\); it must be \(1,\)"),
        ({"h": jnp.ones((1, 3))}, "h has width 3; it must be 4, as wide as rows"),
        ({"assignment": jnp.full(1000, 8)}, "assignment holds code 8; codes must be in 0 .. 7"),
        ({"assignment": jnp.zeros(4, int)}, "num_codes=8: must be at most the 4 tokens"),
        ({"bias": jnp.zeros(1)}, r"bias has shape \(1,\); it must have one value a token"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, jax.Array], message: str) -> None:
    """At the call, where values are known."""
    given = {
        "h": jnp.ones((1, 4)),
        "codes": jnp.ones((8, 4)),
        "assignment": jnp.arange(1000) % 8,
        "targets": jnp.asarray([3]),
        "counts": jnp.ones(1, bool),
    } | change
    with pytest.raises(UserError, match=message):
        codebook.summed_nll(**given)
    given.pop("counts")
    if "counts" not in change:
        with pytest.raises(UserError, match=message):
            codebook.nll(**given)


def test_blocks_have_no_kernel() -> None:
    given = (
        jnp.ones((1, 4)),
        jnp.ones((2, 4)),
        jnp.arange(9) % 2,
        jnp.ones(1, int),
        jnp.ones(1, bool),
    )
    with pytest.raises(
        UserError, match="implementation='pallas_tpu': must be 'xla' or None, as token_"
    ):
        codebook.summed_nll(*given, token_block=4, implementation="pallas_tpu")
    with pytest.raises(UserError, match="token_block is 0; it must be a positive integer"):
        codebook.summed_nll(*given, token_block=0)


def test_arrays_of_numpy() -> None:
    """Maps are, when they are loaded."""
    h, codes, bias = np.ones((2, 4), np.float32), np.eye(3, 4, dtype=np.float32), np.arange(9.0)
    given = np.arange(9) % 3, np.array([3, 8])
    expected = codebook.nll(jnp.asarray(h), jnp.asarray(codes), *map(jnp.asarray, given))
    chex.assert_trees_all_equal(codebook.nll(h, codes, *given), expected)
    of_both = codebook.summed_nll(h, codes, *given, np.ones(2, bool), bias)
    assert of_both[0] == pytest.approx(np.sum(codebook.nll(h, codes, *given, bias)[0]))
