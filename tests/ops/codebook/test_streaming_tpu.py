"""The TPU kernel of the streamed loss, in Pallas's interpreter, against the same definition."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from multi_cases import (
    CASES,
    Case,
    assert_equal_definition,
    loss_from_h,
    make,
    nll_of,
    true_values_and_gradients,
    values_and_gradients,
)
from versions import newest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops.codebook import multi
from vqcx_jax.ops.codebook.streaming import reference, tpu
from vqcx_jax.ops.codebook.streaming.block_sizes import BlockSizes, block_sizes
from vqcx_jax.ops.codebook.tpu_tiles import Tile
from vqcx_jax.ops.dispatch import NotSupported

# Small, and unlike each other, so that tiny problems have several tiles in both directions.
BLOCKS = BlockSizes(Tile(16, 256, 16), Tile(32, 128, 16))
SEVERAL_TILES = {
    "one_codebook": Case(700, (37,), leading=(37,)),
    "three": Case(700, (7, 20, 13), leading=(5, 9)),
    # Not x100: logits of a thousand have an error of 6e-5, and are scaled by log2 e.
    "four_x30": Case(700, (16,) * 4, logit_scale=30.0, leading=(17,)),
    "sixteen_product": Case(300, (8,) * 16, "product", dim=32),
    "two_groups": Case(129, (5, 4, 3), leading=(64,)),
}
ALL_CASES = {name: CASES[name] for name in ("smallest", "empty_codes")} | SEVERAL_TILES


def nll(**options: Any) -> Any:
    options = {"interpret": pltpu.InterpretParams(), "blocks": BLOCKS} | options
    return nll_of(functools.partial(tpu.log_z, **options))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name == "three" else newest_jax)
        for name, case in ALL_CASES.items()
    ],
)
def test_float32(case: Case, in_float64: Any, max_error: Any) -> None:
    assert_equal_definition(nll(), case, jnp.float32, in_float64, max_error)


@newest_jax
@pytest.mark.parametrize("name", ["three", "sixteen_product"])
def test_bfloat16_products(name: str, in_float64: Any, max_error: Any) -> None:
    """Values within the roundings of M code logits, gradients of one probability."""
    case = ALL_CASES[name]
    inputs = make(case)
    loss = loss_from_h(nll(product_dtype="bfloat16"), case.form)
    values, gradients = jax.jit(values_and_gradients(loss))(inputs)
    expected_values, expected = true_values_and_gradients(case, jnp.float32, in_float64)
    code_logits = (
        multi.product_code_logits if case.form == "product" else (multi.additive_code_logits)
    )
    largest = sum(jnp.max(jnp.abs(l)) for l in code_logits(inputs.h, inputs.codebooks))
    chex.assert_trees_all_close(values[1], expected_values[1], rtol=0, atol=2.0**-9 * largest)
    for actual, true in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert max_error(actual, true) <= 2.0**-9 * (largest + 1)


@pytest.mark.parametrize("race", [False, True])
def test_scales(race: bool) -> None:
    """A scale for each token, its gradient, and no tile read while another writes it."""
    x = make(SEVERAL_TILES["three"])
    code_logits = multi.additive_code_logits(x.h, x.codebooks)
    scale = jnp.linspace(-1.0, 2.0, 700)
    params = pltpu.InterpretParams(detect_races=race, num_cores_or_threads=1 + race)
    blocks = BlockSizes(Tile(16, 256, 16), Tile(16, 256, 16)) if race else BLOCKS
    kernel = functools.partial(tpu.log_z, blocks=blocks, interpret=params)

    def both(function: Any) -> Any:
        def of(l: Any, bias: Any, scale: Any) -> jax.Array:
            return function(l, x.assignment, bias, scale)

        z, vjp = jax.vjp(of, code_logits, x.bias, scale)
        return z, vjp(x.weights[0])

    actual, expected = both(kernel), both(reference.log_z)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)
    if race:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert not interpret_pallas_call.races.races_found


@newest_jax
def test_impossible_tokens_and_nan() -> None:
    """Bias -inf keeps whole tiles out; NaN stays at its position."""
    x = make(SEVERAL_TILES["three"])
    bias = jnp.where(jnp.arange(700) < 600, -jnp.inf, jnp.asarray(x.bias))
    h = x.h.at[1, 2].set(jnp.nan)

    def z(h: jax.Array, bias: jax.Array) -> jax.Array:
        code_logits = multi.additive_code_logits(h, x.codebooks)
        return nll()(code_logits, x.assignment, x.targets, bias)[1]

    actual, vjp = jax.vjp(z, h, bias)
    is_nan = np.zeros((5, 9), bool)
    is_nan[1, 2] = True
    np.testing.assert_array_equal(np.isnan(actual), is_nan)
    weights = jnp.where(is_nan, 0.0, 1.0)
    d_h, _ = vjp(weights)
    np.testing.assert_array_equal(np.any(np.isnan(d_h), axis=-1), is_nan)
    clean, vjp = jax.vjp(z, x.h, bias)
    chex.assert_tree_all_finite((clean, vjp(weights)))
    assert not np.any(vjp(weights)[1][:600])


@newest_jax
def test_shard_map_over_positions() -> None:
    """Each device its own positions; gradients by what they share are summed."""
    inputs = make(Case(300, (16, 12, 5), leading=(64,)))
    loss = loss_from_h(nll(), "additive")
    row, whole = PartitionSpec("data"), PartitionSpec()

    def on_mesh(*args: Any) -> Any:
        in_specs = (row, whole, whole, whole, row)
        return jax.shard_map(loss, in_specs=in_specs, out_specs=(row, row))(*args)

    expected = jax.jit(values_and_gradients(loss))(inputs)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        specs = type(inputs)(row, whole, whole, whole, row, (row, row))
        actual = jax.jit(values_and_gradients(on_mesh))(jax.device_put(inputs, specs))
    actual = jax.tree.map(np.asarray, actual)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do() -> None:
    l, codes = jnp.zeros((4, 5000)), jnp.zeros((7, 1), jnp.int32)
    with pytest.raises(NotSupported, match="code logits; at most 4096"):
        tpu.log_z((l,), codes)
    with pytest.raises(NotSupported, match="vocab_size=3000000: at most"):
        jax.eval_shape(
            lambda codes: tpu.log_z((l[:, :9],), codes),
            jax.ShapeDtypeStruct((3_000_000, 1), jnp.int32),
        )
    with pytest.raises(UserError, match="product_dtype=float16: must be float32 or bfloat16"):
        tpu.log_z((l[:, :9],), codes, product_dtype="float16")


def test_tiles_of_the_table_are_whole_registers() -> None:
    for kind in ("TPU v5", "TPU v6 lite", "cpu"):
        for num_code_logits in (128, 512, 4096):
            for tile in block_sizes(kind, num_code_logits, 8192, "float32"):
                assert tile.positions % tile.row_block == 0 and tile.row_block % 16 == 0
                assert tile.tokens % 128 == 0


@pytest.mark.parametrize(
    ("kind", "num_positions", "size"),
    [
        ("TPU v6 lite", 1, 1024),
        ("TPU v6 lite", 2048, 2048),
        ("TPU v6 lite", 3000, 1024),
        ("TPU v6 lite", 6000, 3072),
        ("TPU v6 lite", 5000, 1024),
        ("TPU v6 lite", 32768, 4096),
        # Two cores: at least two tiles, and three would be as many as four.
        ("TPU v5", 2048, 1024),
        ("TPU v5", 3000, 2048),
        ("TPU v5", 8192, 4096),
    ],
)
def test_tiles_are_as_large_as_positions_fill(kind: str, num_positions: int, size: int) -> None:
    forward, backward = block_sizes(kind, 256, num_positions, "bfloat16")
    assert forward.positions == backward.positions == size


def test_exact_products_have_tiles_of_their_own_on_v5p() -> None:
    wide, exact = (block_sizes("TPU v5", 256, 8192, dtype) for dtype in ("bfloat16", "float32"))
    assert (wide.backward.positions, exact.backward.positions) == (4096, 1024)
    assert block_sizes("TPU v5", 512, 8192, "float32") == exact
