"""The streamed softmax: the numbers of the full one, without its V columns."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import softmax
from vqcx_jax.ops.codebook.reference import nll_of_logits

# As users compile it.
pytestmark = [oldest_jax, pytest.mark.usefixtures("fully_optimized")]


class Case(NamedTuple):
    vocab_size: int
    block: int
    leading: tuple[int, ...] = (6,)
    dim: int = 16
    bias_scale: float | None = 1.0
    logit_scale: float = 1.0
    cap: float | None = None


CASES = {
    "smaller_than_block": Case(7, 16, leading=()),
    "one_block": Case(7, 7, leading=(2, 3)),
    "blocks_of_one": Case(7, 1),
    "even": Case(1024, 128, leading=(2, 3)),
    "ragged": Case(1009, 128, leading=(2, 3)),
    "ragged_by_one": Case(1025, 128),
    "no_bias": Case(1009, 128, bias_scale=None),
    "large_logits": Case(1009, 128, logit_scale=100.0),
    "large_bias": Case(1009, 128, bias_scale=100.0),
    "capped": Case(1009, 128, leading=(2, 3), logit_scale=3.0, cap=2.0),
    "capped_no_bias": Case(7, 4, bias_scale=None, cap=0.5),
    "large_vocabulary": Case(50_257, 1024),
}


class Inputs(NamedTuple):
    h: jax.Array
    weights: jax.Array
    bias: jax.Array | None
    targets: jax.Array
    cotangents: tuple[jax.Array, jax.Array]


def make(case: Case, dtype: Any = jnp.float32) -> Inputs:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    bias = None
    if case.bias_scale is not None:
        bias = jnp.asarray(case.bias_scale * normal(case.vocab_size), jnp.float32)
    return Inputs(
        h=jnp.asarray(case.logit_scale * normal((*case.leading, case.dim)), dtype),
        weights=jnp.asarray(normal((case.vocab_size, case.dim)) / case.dim**0.5, dtype),
        bias=bias,
        targets=jnp.asarray(rng.integers(case.vocab_size, size=case.leading), jnp.int32),
        cotangents=tuple(jnp.asarray(normal(case.leading), jnp.float32) for _ in range(2)),
    )


def definition(
    h: Any, weights: Any, targets: Any, bias: Any = None, cap: float | None = None
) -> Any:
    z = h @ weights.T
    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    return nll_of_logits(z if bias is None else z + bias, targets)


def float32_logits(h: Any, weights: Any, targets: Any, bias: Any = None) -> Any:
    """What a bfloat16 layer does plainly: float32 logits, and JAX's own gradient of them.

    Their cotangent stays float32, which is slow and the most accurate.
    """
    z = jnp.einsum("...d,vd->...v", h, weights, preferred_element_type=jnp.float32)
    return nll_of_logits(z if bias is None else z + bias, targets)


def values_and_gradients(nll: Callable[..., Any]) -> Callable[[Inputs], Any]:
    """(nll, log_z) and the gradients by h, weights and bias, with a cotangent on each output."""

    def function(x: Inputs) -> Any:
        values, vjp = jax.vjp(lambda h, w, b: nll(h, w, x.targets, b), x.h, x.weights, x.bias)
        return values, vjp(x.cotangents)

    return function


def rms_error(actual: Any, expected: np.ndarray) -> float:
    difference = np.asarray(actual, np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def streamed(block: int, **options: Any) -> Callable[..., Any]:
    return partial(softmax.streamed_nll, vocab_block=block, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32_values_and_gradients(case: Case, in_float64: Any, max_error: Any) -> None:
    x = make(case)
    nll = streamed(case.block, cap=case.cap)
    values, gradients = jax.jit(values_and_gradients(nll))(x)
    chex.assert_shape(values, case.leading)
    exact = partial(definition, cap=case.cap)
    true_values, true_gradients = in_float64(values_and_gradients(exact), x)
    # A hundred roundings of float32, for a sum of D products and one of V exponentials.
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == jnp.float32
        assert max_error(actual, expected) <= 1e-5


@pytest.mark.parametrize(
    "name", ["smaller_than_block", "ragged", "no_bias", "large_logits", "capped"]
)
def test_bfloat16_inputs(name: str, in_float64: Any, max_error: Any) -> None:
    case = CASES[name]
    x = make(case, jnp.bfloat16)
    nll = streamed(case.block, cap=case.cap)
    values, gradients = jax.jit(values_and_gradients(nll))(x)
    exact = partial(definition, cap=case.cap)
    true_values, true_gradients = in_float64(values_and_gradients(exact), x)
    assert [v.dtype for v in values] == [jnp.float32] * 2
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    # The bias never meets a bfloat16 number.
    if x.bias is not None:
        assert max_error(gradients[2], true_gradients[2]) <= 1e-5
    # Rounding d_z is one rounding more than float32 d_z has: sqrt(2) times its error on average.
    plain_nlls = [partial(softmax.nll, cap=case.cap)]
    if case.cap is None:
        plain_nlls.append(float32_logits)
    for nll in plain_nlls:
        _, plain = jax.jit(values_and_gradients(nll))(x)
        for i in (0, 1):
            assert gradients[i].dtype == jnp.bfloat16
            error = rms_error(gradients[i], true_gradients[i])
            assert error <= 2 * rms_error(plain[i], true_gradients[i])


def test_bfloat16_sums_over_many_blocks_and_positions(in_float64: Any, max_error: Any) -> None:
    """Rounded to bfloat16 block by block, the gradient by h would lose half its digits."""
    x = make(Case(4099, 16, leading=(256,)), jnp.bfloat16)
    _, (d_h, d_weights, _) = jax.jit(values_and_gradients(streamed(16)))(x)
    _, (true_d_h, true_d_weights, _) = in_float64(values_and_gradients(definition), x)
    assert max_error(d_h, true_d_h) <= 2.0**-8
    assert max_error(d_weights, true_d_weights) <= 2.0**-7  # d_z and the result are rounded.


@pytest.mark.parametrize("nll", [streamed(128), softmax.nll], ids=["streamed", "full"])
def test_products_keep_bfloat16_operands(nll: Callable[..., Any]) -> None:
    """A float32 cotangent would have XLA widen the products of the backward pass."""
    x = make(CASES["ragged"], jnp.bfloat16)
    products = [e for e in equations(nll, x) if e.primitive.name == "dot_general"]
    assert len(products) >= 3
    for product in products:
        assert [operand.aval.dtype for operand in product.invars] == [jnp.bfloat16] * 2


def test_holds_no_array_of_v_columns() -> None:
    """Nor a second copy of the weights or of their gradient."""
    case = Case(20_011, 256, leading=(64,), dim=32)
    x = make(case)

    def largest_array(nll: Callable[..., Any]) -> int:
        return max(array.aval.size for e in equations(nll, x) for array in e.outvars)

    def temporary_bytes(nll: Callable[..., Any]) -> int:
        compiled = jax.jit(values_and_gradients(nll)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert largest_array(streamed(case.block)) == x.weights.size
    assert largest_array(softmax.nll) == 64 * 20_011
    assert temporary_bytes(streamed(case.block)) <= 8 * 4 * 64 * case.block
    assert temporary_bytes(softmax.nll) >= 4 * 64 * 20_011


def test_minus_infinity_in_bias_bans_tokens() -> None:
    """Even when they fill the first block, the last, and one between."""
    x = make(CASES["ragged"])
    block = jnp.arange(1009) // 128
    banned = (block == 0) | (block == 3) | (block == 7)
    x = x._replace(bias=jnp.where(banned, -jnp.inf, x.bias), targets=jnp.full((2, 3), 200))
    values, gradients = jax.jit(values_and_gradients(streamed(128)))(x)
    chex.assert_tree_all_finite((values, gradients))
    assert not np.any(gradients[2][banned])
    chex.assert_trees_all_close(values, jax.jit(values_and_gradients(definition))(x)[0], rtol=1e-5)


def test_nan_stays_at_its_position() -> None:
    x = make(CASES["ragged"])
    outputs = jax.jit(streamed(128))(x.h.at[1, 2, 0].set(jnp.nan), x.weights, x.targets, x.bias)
    for output in outputs:
        np.testing.assert_array_equal(np.isnan(output), [[False] * 3, [False, False, True]])


def test_under_vmap() -> None:
    x = make(CASES["ragged"])
    of_row = values_and_gradients(streamed(128))
    axes = Inputs(h=0, weights=None, bias=None, targets=0, cotangents=0)
    whole = jax.jit(of_row)(x)
    values, (d_h, d_weights, d_bias) = jax.jit(jax.vmap(of_row, (axes,)))(x)
    summed = values, (d_h, d_weights.sum(0), d_bias.sum(0))
    chex.assert_trees_all_close(summed, whole, rtol=1e-5, atol=1e-6)


def test_under_vmap_of_weights() -> None:
    x = make(CASES["ragged"])
    weights = jnp.stack([x.weights, -x.weights])
    mapped = jax.jit(jax.vmap(lambda w: values_and_gradients(streamed(128))(x._replace(weights=w))))
    for i, one in enumerate(weights):
        expected = jax.jit(values_and_gradients(streamed(128)))(x._replace(weights=one))
        actual = jax.tree.map(lambda y, i=i: y[i], mapped(weights))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_under_checkpoint() -> None:
    x = make(CASES["ragged"])
    plain = jax.jit(values_and_gradients(streamed(128)))(x)
    again = jax.jit(values_and_gradients(jax.checkpoint(streamed(128))))(x)
    chex.assert_trees_all_close(again, plain, rtol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["ragged", "no_bias"])
def test_inside_shard_map(name: str, axis_type: AxisType) -> None:
    """Positions lie on eight devices; the gradients by weights and bias are summed over them."""
    case = CASES[name]._replace(leading=(8, 3))
    x = make(case)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharded = jax.shard_map(
        streamed(case.block),
        mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P()),
        out_specs=P("data"),
    )
    expected = jax.jit(values_and_gradients(streamed(case.block)))(x)
    specs = Inputs(h=P("data"), weights=P(), bias=P(), targets=P("data"), cotangents=P("data"))
    with jax.set_mesh(mesh):
        x = Inputs(
            *(jax.device_put(y, NamedSharding(mesh, s)) for y, s in zip(x, specs, strict=True))
        )
        actual = jax.jit(values_and_gradients(sharded))(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("case", [Case(1024, 100, cap=2.0), Case(8, 4, bias_scale=None)])
def test_rows_on_several_devices(case: Case, axis_type: AxisType) -> None:
    """Rows lie on two axes of two devices each, positions on the third."""
    case = case._replace(leading=(2, 3))
    x = make(case)
    mesh = jax.make_mesh((2, 2, 2), ("data", "a", "b"), axis_types=(axis_type,) * 3)
    rows = P(("b", "a"))
    options = {"cap": case.cap, "vocab_axes": ("b", "a")}
    sharded = jax.shard_map(
        streamed(case.block, **options),
        mesh=mesh,
        in_specs=(P("data"), rows, P("data"), rows),
        out_specs=P("data"),
    )
    expected = jax.jit(values_and_gradients(streamed(case.block, cap=case.cap)))(x)
    specs = Inputs(h=P("data"), weights=rows, bias=rows, targets=P("data"), cotangents=P("data"))
    with jax.set_mesh(mesh):
        x = Inputs(
            *(jax.device_put(y, NamedSharding(mesh, s)) for y, s in zip(x, specs, strict=True))
        )
        actual = jax.jit(values_and_gradients(sharded))(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_device_whose_rows_are_all_banned() -> None:
    case = Case(64, 8, leading=(3,))
    x = make(case)
    x = x._replace(bias=x.bias.at[16:32].set(-jnp.inf), targets=x.targets % 16)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        streamed(case.block, vocab_axes=("rows",)),
        mesh=mesh,
        in_specs=(P(), P("rows"), P(), P("rows")),
        out_specs=P(),
    )
    expected = jax.jit(values_and_gradients(streamed(case.block)))(x)
    chex.assert_tree_all_finite(expected)
    with jax.set_mesh(mesh):
        actual = jax.jit(values_and_gradients(sharded))(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [0, -1])
def test_block_must_be_positive(block: int) -> None:
    x = make(CASES["ragged"])
    with pytest.raises(UserError, match=f"vocab_block is {block}; it must be a positive integer"):
        softmax.streamed_nll(x.h, x.weights, x.targets, vocab_block=block)


def equations(nll: Callable[..., Any], x: Inputs) -> Iterator[Any]:
    """Of nll and its gradients, those of inner loops too."""
    return _equations(jax.make_jaxpr(values_and_gradients(nll))(x).jaxpr)


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)
