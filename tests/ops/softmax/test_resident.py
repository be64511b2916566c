"""The TPU kernel of the summed loss of few rows, in Pallas's interpreter."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
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
from versions import newest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.softmax import resident
from vqcx_jax.ops.tpu_resident import Tile

# Small, so that tiny problems have several steps, row blocks and blocks of columns.
TILE = Tile(32, 16, 128)
CASES = {
    "smallest": Case(7, leading=()),
    "several_steps": Case(300, leading=(7, 11), dim=200),
    "no_bias": Case(128, leading=(64,), bias_scale=None, dim=128),
    "large_logits": Case(99, leading=(40,), logit_scale=100.0),
    "large_bias": Case(99, leading=(40,), bias_scale=100.0, z_loss=0.0),
    "capped": Case(130, leading=(33,), logit_scale=3.0, cap=2.0),
}


def kernel(case: Case, **options: Any) -> Any:
    options = {"interpret": pltpu.InterpretParams(), "tile": TILE} | options
    return partial(resident.tpu.summed_nll, cap=case.cap, **options)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name == "several_steps" else newest_jax)
        for name, case in CASES.items()
    ],
)
def test_float32(case: Case, in_float64: Any, max_error: Any) -> None:
    x = make(case)
    values, gradients = jax.jit(values_and_gradients(kernel(case)))(x)
    exact = partial(sums(definition), cap=case.cap)
    true_values, true_gradients = in_float64(values_and_gradients(exact), x)
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    # Without gradients, another program.
    chex.assert_trees_all_close(jax.jit(kernel(case))(*x), true_values, rtol=1e-5)
    pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(true_gradients), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == jnp.float32
        assert max_error(actual, expected) <= 1e-5


@newest_jax
@pytest.mark.parametrize(
    ("name", "chip"),
    [("several_steps", "TPU v6 lite"), ("several_steps", "TPU v5p"), ("capped", "TPU v6 lite")],
)
def test_bfloat16(
    name: str, chip: str, in_float64: Any, max_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice the error of the plain computation, with one core and with two."""
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", chip))
    case = CASES[name]._replace(leading=(5, 25))  # Four blocks.
    x = make(case, jnp.bfloat16)
    values, gradients = jax.jit(values_and_gradients(kernel(case)))(x)
    exact = partial(sums(definition), cap=case.cap)
    true_values, true_gradients = in_float64(values_and_gradients(exact), x)
    assert [v.dtype for v in values] == [jnp.float32] * 2
    chex.assert_trees_all_close(values, true_values, rtol=1e-5)
    for i in (2, 3):  # Bias and z_loss never meet a bfloat16 number.
        assert max_error(gradients[i], true_gradients[i]) <= 1e-5
    for nll in (plain, float32_logits) if case.cap is None else (plain,):
        _, others = jax.jit(values_and_gradients(partial(sums(nll), cap=case.cap)))(x)
        for i in (0, 1):
            assert gradients[i].dtype == jnp.bfloat16
            error = rms_error(gradients[i], true_gradients[i])
            assert error <= 2 * rms_error(others[i], true_gradients[i])


@pytest.mark.parametrize("race", [False, True])
def test_two_cores(race: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each core has a group of positions, and neither reads what the other writes."""
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v5p"))
    case = CASES["several_steps"]._replace(leading=(128,))
    x = make(case)
    params = pltpu.InterpretParams(detect_races=race, num_cores_or_threads=1 + race)
    actual = values_and_gradients(kernel(case, interpret=params))(x)
    expected = jax.jit(values_and_gradients(resident.xla.summed_nll))(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    if race:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert not interpret_pallas_call.races.races_found


@newest_jax
def test_positions_that_do_not_count_and_rows_that_are_none() -> None:
    case = CASES["several_steps"]
    x = make(case)
    banned = jnp.arange(300) >= 200
    x = x._replace(bias=jnp.where(banned, -jnp.inf, x.bias), targets=x.targets % 200)
    values, gradients = jax.jit(values_and_gradients(kernel(case)))(x)
    chex.assert_tree_all_finite((values, gradients))
    assert not np.any(gradients[0][~x.counts])
    assert not np.any(gradients[1][banned])
    expected = jax.jit(values_and_gradients(resident.xla.summed_nll))(x)
    chex.assert_trees_all_close((values, gradients), expected, rtol=1e-5, atol=1e-5)


@newest_jax
def test_nan() -> None:
    case = CASES["several_steps"]
    x = make(case)
    x = x._replace(h=x.h.at[0, 0].set(jnp.nan))
    assert all(np.isnan(value) for value in jax.jit(kernel(case))(*x))
    values, _ = jax.jit(values_and_gradients(kernel(case)))(x)
    assert all(np.isnan(value) for value in values)


@newest_jax
def test_shard_map_over_positions() -> None:
    """Each device sums its own positions; gradients by what they share are summed."""
    case = CASES["several_steps"]._replace(leading=(64,))
    x = make(case)
    row, whole = PartitionSpec("data"), PartitionSpec()

    def on_mesh(*args: Any) -> Any:
        def sums(*args: Any) -> Any:
            return jax.lax.psum(kernel(case)(*args), "data")

        in_specs = (row, whole, row, row, whole, whole)
        return jax.shard_map(sums, in_specs=in_specs, out_specs=(whole, whole))(*args)

    expected = jax.jit(values_and_gradients(kernel(case)))(x)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        x = jax.device_put(x, Inputs(row, whole, row, row, whole, whole))
        actual = jax.jit(values_and_gradients(on_mesh))(x)
    actual = jax.tree.map(np.asarray, actual)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do() -> None:
    x = make(CASES["smallest"])
    large = x._replace(h=jnp.zeros((4096,)), weights=jnp.zeros((4096, 4096)), bias=None)
    with pytest.raises(NotSupported, match="4096 rows of 4096 do not fit vector memory"):
        resident.tpu.summed_nll(*large)
    half = x._replace(h=x.h.astype(jnp.float16), weights=x.weights.astype(jnp.float16))
    with pytest.raises(NotSupported, match="float16"):
        resident.tpu.summed_nll(*half)
    with pytest.raises(UserError, match="needs a tpu"):
        resident.summed_nll(*x, implementation="pallas_tpu")
