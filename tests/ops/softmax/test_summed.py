"""The summed softmax loss: sums of the full one's, gradients made along with them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from summed_cases import (
    Case,
    Inputs,
    definition,
    float32_logits,
    make,
    plain,
    rms_error,
    sums,
    values_and_gradients,
)
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device, softmax

# As users compile it.
pytestmark = [oldest_jax, pytest.mark.usefixtures("fully_optimized")]


CASES = {
    "one_position": Case(7, leading=()),
    "one_block": Case(7, token_block=10),
    "smaller_than_block": Case(7, token_block=99, bias_scale=None),
    "blocks_of_one": Case(1000, token_block=1),
    "even": Case(2048, token_block=5),
    "ragged": Case(5000, leading=(3, 7), z_loss=0.0),
    "ragged_by_one": Case(1025, token_block=9, bias_scale=None),
    "large_logits": Case(1009, logit_scale=100.0),
    "large_bias": Case(1009, bias_scale=100.0),
    "capped": Case(2500, logit_scale=3.0, cap=2.0),
    "capped_no_bias": Case(1009, bias_scale=None, cap=0.5),
    "large_vocabulary": Case(50_257),
}


def in_blocks(case: Case, **options: Any) -> Callable[..., Any]:
    return partial(softmax.summed_nll, token_block=case.token_block, cap=case.cap, **options)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float32_values_and_gradients(case: Case, in_float64: Any, max_error: Any) -> None:
    x = make(case)
    values, gradients = jax.jit(values_and_gradients(in_blocks(case)))(x)
    chex.assert_shape(values, ())
    exact = partial(sums(definition), cap=case.cap)
    true_values, true_gradients = in_float64(values_and_gradients(exact), x)
    # A hundred roundings of float32, for a sum of D products and one of V exponentials.
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    # Without gradients, another program.
    chex.assert_trees_all_close(jax.jit(in_blocks(case))(*x), true_values, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == jnp.float32
        assert max_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("name", ["one_block", "ragged_by_one", "large_logits", "capped"])
def test_bfloat16_inputs(name: str, in_float64: Any, max_error: Any) -> None:
    case = CASES[name]
    x = make(case, jnp.bfloat16)
    values, gradients = jax.jit(values_and_gradients(in_blocks(case)))(x)
    exact = partial(sums(definition), cap=case.cap)
    true_values, true_gradients = in_float64(values_and_gradients(exact), x)
    assert [v.dtype for v in values] == [jnp.float32] * 2
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    # Bias and z_loss never meet a bfloat16 number.
    for i in (2, 3):
        if gradients[i] is not None:
            assert max_error(gradients[i], true_gradients[i]) <= 1e-5
    # Rounding d_z is one rounding more than float32 d_z has: sqrt(2) times its error on average.
    for nll in (plain, float32_logits) if case.cap is None else (plain,):
        _, others = jax.jit(values_and_gradients(partial(sums(nll), cap=case.cap)))(x)
        for i in (0, 1):
            assert gradients[i].dtype == jnp.bfloat16
            error = rms_error(gradients[i], true_gradients[i])
            assert error <= 2 * rms_error(others[i], true_gradients[i])


def test_bfloat16_sums_over_many_blocks(in_float64: Any, max_error: Any) -> None:
    """Rounded to bfloat16 block by block, the gradient by weights would lose half its digits."""
    case = Case(1500, token_block=4, leading=(512,))
    x = make(case, jnp.bfloat16)
    _, (d_h, d_weights, _, _) = jax.jit(values_and_gradients(in_blocks(case)))(x)
    _, (true_d_h, true_d_weights, _, _) = in_float64(values_and_gradients(sums(definition)), x)
    assert max_error(d_h, true_d_h) <= 2.0**-7  # d_z and the result are rounded.
    assert max_error(d_weights, true_d_weights) <= 2.0**-7


def test_positions_that_do_not_count() -> None:
    """No loss and no influence on any gradient, wherever the blocks are cut."""
    x = make(CASES["ragged"])
    values, gradients = jax.jit(values_and_gradients(in_blocks(CASES["ragged"])))(x)
    counted = x._replace(h=x.h[x.counts], targets=x.targets[x.counts])
    counted = counted._replace(counts=jnp.ones_like(counted.targets, bool))
    expected_values, expected = jax.jit(values_and_gradients(in_blocks(Case(5000))))(counted)
    chex.assert_trees_all_close(values, expected_values, rtol=1e-6)
    assert not np.any(gradients[0][~x.counts])
    chex.assert_trees_all_close(gradients[0][x.counts], expected[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(gradients[1:], expected[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_none_counts(z_loss: float) -> None:
    x = make(CASES["even"]._replace(z_loss=z_loss))
    x = x._replace(counts=jnp.zeros_like(x.counts))
    outputs = jax.jit(values_and_gradients(in_blocks(CASES["even"])))(x)
    assert not any(np.any(y) for y in jax.tree.leaves(outputs))


def test_nll_has_no_gradient() -> None:
    case = CASES["one_block"]
    x = make(case)
    nll = jax.grad(lambda h, w: in_blocks(case)(h, w, *x[2:])[1], (0, 1))
    assert not any(np.any(y) for y in jax.jit(nll)(x.h, x.weights))


def test_minus_infinity_in_bias_bans_tokens() -> None:
    """Even when they fill the first block of the vocabulary, and the last."""
    case = CASES["ragged"]
    x = make(case)
    block = jnp.arange(5000) // 1024
    banned = (block == 0) | (block == 4) | (jnp.arange(5000) == 1500)
    x = x._replace(bias=jnp.where(banned, -jnp.inf, x.bias), targets=jnp.full((3, 7), 2000))
    values, gradients = jax.jit(values_and_gradients(in_blocks(case)))(x)
    chex.assert_tree_all_finite((values, gradients))
    assert not np.any(gradients[2][banned])
    expected = jax.jit(sums(definition), static_argnames="cap")(*x)
    chex.assert_trees_all_close(values, expected, rtol=1e-5)


def test_under_vmap_and_checkpoint() -> None:
    case = CASES["even"]
    x = make(case)
    function = values_and_gradients(jax.checkpoint(in_blocks(case)))
    two = x._replace(h=jnp.stack([x.h, -x.h]), weights=jnp.stack([x.weights, x.weights + 0.1]))
    axes = Inputs(h=0, weights=0, targets=None, counts=None, bias=None, z_loss=None)
    mapped = jax.jit(jax.vmap(function, (axes,)))(two)
    for i in range(2):
        one = x._replace(h=two.h[i], weights=two.weights[i])
        expected = jax.jit(values_and_gradients(in_blocks(case)))(one)
        actual = jax.tree.map(lambda y, i=i: y[i], mapped)
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("case", "rows"),
    [
        (Case(1024, leading=(8, 3), cap=2.0), ()),
        (Case(4100, leading=(8, 3), cap=2.0), ("b", "a")),
        (Case(8, leading=(8, 3), bias_scale=None), ("b", "a")),
    ],
    ids=["positions", "rows", "no_bias"],
)
def test_on_several_devices(case: Case, rows: tuple[str, ...], axis_type: AxisType) -> None:
    """Positions lie on one axis or all, rows on two or none."""
    x = make(case)
    if rows and x.bias is not None:  # All rows of one device are banned.
        x = x._replace(bias=x.bias.at[1025:2050].set(-jnp.inf), targets=x.targets % 1025)
    mesh = jax.make_mesh((2, 2, 2), ("data", "a", "b"), axis_types=(axis_type,) * 3)
    positions = ("data",) if rows else ("data", "a", "b")
    of_device = in_blocks(case, vocab_axes=rows)
    by_row, by_position = P(rows or None), P(positions)
    specs = Inputs(by_position, by_row, by_position, by_position, by_row, P())
    sharded = jax.shard_map(
        lambda *args: jax.lax.psum(of_device(*args), positions),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=P(),
    )
    expected = jax.jit(values_and_gradients(in_blocks(case)))(x)
    chex.assert_tree_all_finite(expected)
    with jax.set_mesh(mesh):
        x = Inputs(
            *(jax.device_put(y, NamedSharding(mesh, s)) for y, s in zip(x, specs, strict=True))
        )
        actual = jax.jit(values_and_gradients(sharded))(x)
        values = jax.jit(sharded)(*x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(values, expected[0], rtol=1e-5)


def test_products() -> None:
    """One without gradients, three with them, and of bfloat16 operands."""
    case = CASES["even"]
    x = make(case, jnp.bfloat16)
    for function, count in ((lambda x: in_blocks(case)(*x), 1), (with_gradients(case), 3)):
        jaxpr = jax.make_jaxpr(function)(x).jaxpr
        products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
        assert len(products) == count
        for product in products:
            assert [operand.aval.dtype for operand in product.invars] == [jnp.bfloat16] * 2


def test_memory() -> None:
    """A block's logits, whatever N; no second gradient by weights, and none without asking."""
    case = Case(20_011, token_block=64, leading=(128,), dim=256)
    longer = case._replace(leading=(512,))
    held, of_rows = 4 * 64 * 20_011, 4 * 1024 * (64 + 256)
    short, long = (temporary_bytes(with_gradients(c), c) for c in (case, longer))
    assert short <= held + 4 * of_rows
    assert long - short <= 4 * 4 * (512 - 128) * 256  # Hidden states and their gradients.
    assert temporary_bytes(lambda x: in_blocks(case)(*x), case) <= 4 * 4 * 128 * 1024
    assert temporary_bytes(values_and_gradients(sums(plain)), longer) >= 8 * held


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H100 80GB HBM3"))


@pytest.mark.parametrize("name", ["smaller_than_block", "ragged", "capped", "large_vocabulary"])
def test_whole_rows_on_accelerators(
    name: str, accelerator: None, in_float64: Any, max_error: Any
) -> None:
    """All rows are one block there; positions are still cut."""
    case = CASES[name]
    x = make(case)
    values, gradients = jax.jit(values_and_gradients(in_blocks(case)))(x)
    exact = partial(sums(definition), cap=case.cap)
    true_values, true_gradients = in_float64(values_and_gradients(exact), x)
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    for actual, expected in zip(*map(jax.tree.leaves, (gradients, true_gradients)), strict=True):
        assert max_error(actual, expected) <= 1e-5


@pytest.mark.parametrize(
    ("vocab_size", "is_cpu", "num_blocks"),
    # 8192 positions of 128,256 tokens: 1024 on accelerators. Of 2 million: 128, the least.
    [(128_256, True, 64), (128_256, False, 8), (2_000_000, False, 64), (300, False, 1)],
)
def test_positions_of_a_block(
    vocab_size: int, is_cpu: bool, num_blocks: int, request: pytest.FixtureRequest
) -> None:
    if not is_cpu:
        request.getfixturevalue("accelerator")
    x = jax.eval_shape(lambda: make(Case(7, leading=(8192,), dim=4)))
    x = x._replace(
        weights=jax.ShapeDtypeStruct((vocab_size, 4), jnp.float32),
        bias=jax.ShapeDtypeStruct((vocab_size,), jnp.float32),
    )
    jaxpr = jax.make_jaxpr(values_and_gradients(softmax.summed_nll))(x)
    # Blocks of rows, within those of positions, are two loops more.
    lengths = [
        eqn.params["length"] for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"
    ]
    assert lengths[0] == num_blocks
    assert (max(lengths[1:], default=1) > 1) == is_cpu


@pytest.mark.parametrize("token_block", [0, -1])
def test_block_must_be_positive(token_block: int) -> None:
    x = make(CASES["one_block"])
    message = f"token_block is {token_block}; it must be a positive integer"
    with pytest.raises(UserError, match=message):
        softmax.summed_nll(*x, token_block=token_block)


def test_what_does_not_fit_is_refused() -> None:
    """At the call, where values are known."""
    x = make(CASES["one_block"])
    of_all = (
        (softmax.summed_nll, {"counts": x.counts}),
        (softmax.streamed_nll, {}),
        (softmax.nll, {}),
    )
    num_rows = len(x.weights)
    for function, more in of_all:
        with pytest.raises(UserError, match=f"targets hold {num_rows}: must be in 0 .."):
            function(x.h, x.weights, jnp.full_like(x.targets, num_rows), **more)
        with pytest.raises(UserError, match=r"bias has shape \(1,\); it must have one value"):
            function(x.h, x.weights, x.targets, bias=jnp.zeros(1), **more)
        with pytest.raises(UserError, match=r"targets has shape \(\); it must be"):
            function(x.h, x.weights, jnp.int32(0), **more)
        with pytest.raises(UserError, match="h has width 1; it must be"):
            function(x.h[..., :1], x.weights, x.targets, **more)
    with pytest.raises(UserError, match=r"counts has shape \(\); it must be"):
        softmax.summed_nll(x.h, x.weights, x.targets, jnp.ones((), bool))


def with_gradients(case: Case) -> Callable[[Inputs], Any]:
    return values_and_gradients(in_blocks(case))


def temporary_bytes(function: Callable[[Inputs], Any], case: Case) -> int:
    compiled = jax.jit(function).lower(make(case)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of inner loops too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)
