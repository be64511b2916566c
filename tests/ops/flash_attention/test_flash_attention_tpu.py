"""The TPU kernels, in Pallas's interpreter of TPUs, against attention over turned queries and keys.

The interpreter keeps blocks, semaphores and copies as a TPU does, and fills memory that nothing has
written with NaN.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax, oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import attention
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.flash_attention import xla
from vqcx_jax.ops.flash_attention.amplitude import num_planes
from vqcx_jax.ops.flash_attention.block_sizes import BlockSizes, block_sizes, fit
from vqcx_jax.ops.flash_attention.tpu import attend

SMALL = BlockSizes(128, 128, 128, 128, sub_q=128, sub_kv_backward=128)


class Case(NamedTuple):
    """One problem; sizes as small as show all of blocks, heads and masks."""

    length: int = 300
    num_heads: int = 2
    num_kv_heads: int = 2
    width: int = 64
    value_width: int = 64
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    segments: bool = False
    encoding: str = "complex"
    blocks: BlockSizes = SMALL
    batch: int = 1
    zeros: bool = False
    shared: bool = False
    first_position: int = 0
    races: bool = False


CASES = {
    "causal": Case(zeros=True, races=True, num_heads=1, num_kv_heads=1),
    "rope_far_away": Case(
        encoding="rope",
        first_position=40_000,
        length=256,
        width=128,
        value_width=128,
        num_heads=1,
        num_kv_heads=1,
    ),
    "groups_and_segments": Case(num_heads=2, num_kv_heads=1, batch=2, segments=True),
    "group_of_three": Case(
        num_heads=3, num_kv_heads=1, length=256, encoding="bias", value_width=128, races=True
    ),
    "window_and_soft_cap": Case(window=70, soft_cap=2.0, length=384, num_heads=1, num_kv_heads=1),
    "window_on_both_sides": Case(
        causal=False,
        window=100,
        length=400,
        num_heads=1,
        num_kv_heads=1,
        blocks=BlockSizes(128, 256, 256, 128, sub_q=128, sub_kv_backward=128),
    ),
    "strips": Case(
        blocks=BlockSizes(512, 512, 512, 512, sub_q=128, sub_kv_backward=256),
        window=600,
        length=1000,
        num_heads=1,
        num_kv_heads=1,
    ),
    "unequal_blocks": Case(
        blocks=BlockSizes(256, 128, 128, 256, sub_q=128, sub_kv_backward=128),
        length=500,
        num_heads=1,
        num_kv_heads=1,
    ),
    "keys_in_chunks": Case(
        blocks=BlockSizes(128, 128, 128, 128, 128, 128, cached_keys=128, chunk_keys=256),
        length=500,
        width=256,
        num_heads=2,
        num_kv_heads=1,
    ),
    "pope": Case(
        encoding="pope",
        num_heads=2,
        num_kv_heads=1,
        blocks=BlockSizes(128, 128, 128, 128, 128, 128, chunk_keys=256),
        races=True,
    ),
    "pope_segments": Case(encoding="pope", num_heads=2, batch=2, segments=True, soft_cap=2.0),
    "one_tile": Case(
        encoding="pope", length=128, width=128, value_width=128, num_heads=1, num_kv_heads=1
    ),
    "moduli": Case(encoding="moduli", num_heads=2, num_kv_heads=1, zeros=True),
    # Without a delta, frequencies that all heads share come as cosines and sines.
    "pope_shared": Case(
        encoding="pope",
        shared=True,
        num_kv_heads=1,
        batch=2,
        segments=True,
        blocks=BlockSizes(128, 256, 256, 128, 128, 128, chunk_keys=256),
        races=True,
    ),
    "rope_shared": Case(encoding="rope", shared=True, first_position=40_000, num_kv_heads=1),
    "bias_shared": Case(encoding="bias", shared=True, num_heads=3, num_kv_heads=1, length=256),
    "moduli_shared": Case(encoding="moduli", shared=True, zeros=True, width=128),
    "complex_shared": Case(shared=True, num_kv_heads=1, length=200),
}
AMPLITUDES = {"pope": "softplus", "moduli": "modulus"}


def make(case: Case, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays with gradients, and the others."""
    keys = iter(jax.random.split(jax.random.key(len(repr(case))), 8))
    amplitude: Any = AMPLITUDES.get(case.encoding)
    b, t, p = case.batch, case.length, num_planes(case.width, amplitude)

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    arrays = {
        "q": 2 * normal(b, t, case.num_heads, case.width).astype(dtype),
        "k": normal(b, t, case.num_kv_heads, case.width).astype(dtype),
        "v": normal(b, t, case.num_kv_heads, case.value_width).astype(dtype),
        "frequencies": attention.rope_frequencies(2 * p)
        if case.shared
        else jnp.tile(attention.rope_frequencies(2 * p), (case.num_kv_heads, 1)),
    }
    if case.encoding == "complex":
        arrays["delta"] = 0.7 * normal(case.num_kv_heads, p)
    if case.encoding != "rope":
        arrays["bias"] = 0.5 * normal(case.num_heads, p)
    if case.zeros:
        arrays["q"] = arrays["q"].at[:, 3:150:7].set(0.0)
        arrays["k"] = arrays["k"].at[:, 5::11].set(0.0).at[:, 6::11, :, : p // 2].set(0.0)
    positions = jnp.broadcast_to(jnp.arange(t) + case.first_position, (b, t))
    segment_ids = None
    if case.segments:
        cuts = jnp.array([[t // 3, t // 2], [150, 151]])[:b]
        segment_ids = jnp.sum(positions[:, :, None] >= cuts[:, None], -1) + 1
        first = jnp.where(
            segment_ids == 1, 0, jnp.where(segment_ids == 2, cuts[:, :1], cuts[:, 1:])
        )
        positions = positions - first
    fixed = {"positions": positions, "segment_ids": segment_ids, "amplitude": amplitude}
    return arrays, fixed


def ours(case: Case, arrays: dict[str, Any], fixed: dict[str, Any]) -> jax.Array:
    return attend(
        **{"delta": None, "bias": None} | arrays | fixed,
        scale=case.width**-0.5,
        causal=case.causal,
        window=case.window,
        soft_cap=case.soft_cap,
        block_sizes=case.blocks,
        interpret=pltpu.InterpretParams(detect_races=case.races),
    )


def definition(case: Case, arrays: dict[str, Any], fixed: dict[str, Any]) -> jax.Array:
    """The formula in float32 throughout."""
    wide = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    with jax.default_matmul_precision("highest"):
        return xla.attend(
            **{"delta": None, "bias": None} | wide | fixed,
            scale=case.width**-0.5,
            causal=case.causal,
            window=case.window,
            soft_cap=case.soft_cap,
        )


def value_and_gradients(function: Any, case: Case, arrays: Any, fixed: Any) -> dict[str, Any]:
    def run(arrays: dict[str, Any]) -> dict[str, Any]:
        out, pull_back = jax.vjp(lambda arrays: function(case, arrays, fixed), arrays)
        weight = jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype)
        return {"out": out} | pull_back(weight)[0]

    return jax.jit(run)(arrays)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=oldest_jax if name in ("causal", "group_of_three", "pope_shared") else newest_jax,
        )
        for name in CASES
    ],
)
def test_float32_is_the_definition(name: str) -> None:
    case = CASES[name]
    arrays, fixed = make(case, jnp.float32)
    actual = value_and_gradients(ours, case, arrays, fixed)
    expected = value_and_gradients(definition, case, arrays, fixed)
    for key, value in expected.items():
        # Those by frequencies are sums of terms as large as the positions, that cancel.
        tolerance = 1e-5
        if key == "frequencies":
            tolerance *= 3 + case.first_position / case.length
        error = np.max(np.abs(actual[key] - value)) / np.max(np.abs(value))
        assert error < tolerance, key


@newest_jax
@pytest.mark.parametrize("name", ["group_of_three", "pope_shared"])
def test_bfloat16_is_near_the_definition(name: str) -> None:
    """As near as one rounding of turned queries and keys, and one of weights, leaves it."""
    case = CASES[name]._replace(races=False)
    arrays, fixed = make(case, jnp.bfloat16)
    actual = value_and_gradients(ours, case, arrays, fixed)
    expected = value_and_gradients(definition, case, arrays, fixed)
    for key, value in expected.items():
        assert actual[key].dtype == arrays.get(key, arrays["q"]).dtype
        difference = np.asarray(actual[key], np.float32) - np.asarray(value, np.float32)
        relative = np.linalg.norm(difference) / np.linalg.norm(np.asarray(value, np.float32))
        # Those by frequencies as above: plain JAX is off by 0.018 for PoPE.
        is_pope_frequencies = "pope" in name and key == "frequencies"
        assert relative < (0.015 if is_pope_frequencies else 0.01), key


@pytest.mark.parametrize(
    ("name", "change", "num_tables"),
    [
        ("pope_shared", {}, 4),
        ("rope_shared", {}, 4),
        ("pope_shared", {"shared": False, "num_kv_heads": 2}, 0),
        ("pope_shared", {"width": 256}, 0),
        ("complex_shared", {}, 0),
    ],
)
def test_tables_of_cosines(name: str, change: dict[str, Any], num_tables: int) -> None:
    """Cosines and sines, each of queries' and of keys' positions, are operands of the kernel."""
    case = CASES[name]._replace(races=False, **change)
    arrays, fixed = make(case, jnp.float32)
    jaxpr = jax.make_jaxpr(lambda arrays: ours(case, arrays, fixed))(arrays)
    (kernel,) = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "pallas_call"]
    planes = num_planes(case.width, fixed["amplitude"])
    shapes = [x.aval.shape for x in kernel.invars]
    of_tables = [s for s in shapes if len(s) == 3 and s[:2] == (case.batch, planes) and s[2] > 1]
    assert len(of_tables) == num_tables


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of inner functions too, but for what a kernel is made of."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name != "pallas_call":
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from equations(inner)


@newest_jax
def test_padding_is_not_seen() -> None:
    """A sequence alone and as the beginning of a longer one give the same."""
    case = Case(length=300, num_heads=1, num_kv_heads=1)
    arrays, fixed = make(case, jnp.float32)
    short = {name: x[:, :170] if name in ("q", "k", "v") else x for name, x in arrays.items()}
    alone = ours(case, short, fixed | {"positions": fixed["positions"][:, :170]})
    np.testing.assert_allclose(alone, ours(case, arrays, fixed)[:, :170], atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 100, 1, 64)}, "k, v: have 100 and 128 positions, must have the 128 of q"),
        ({"k": (1, 128, 3, 64)}, "k, v: have 3 and 2 heads"),
        ({"k": (1, 128, 2, 32)}, "k: is 32 wide, must be as wide as q, 64"),
        ({"amplitude": "cube"}, "amplitude='cube': must be None or one of"),
        (
            {"amplitude": "modulus", "delta": (2, 32)},
            "delta: must be None for amplitude='modulus', which leaves phases out",
        ),
        ({"window": 0}, "window=0: must be at least 1"),
        ({"block_sizes": BlockSizes(block_q=100)}, "block_q=100: must be a multiple of 128"),
        ({"block_sizes": BlockSizes(block_q=384)}, "block_q=384: must divide the largest block, 1"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: jnp.zeros((1, 128, 2, 64)) for name in ("q", "k", "v")}
    arguments |= {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in change.items()}
    with pytest.raises(UserError, match=message):
        attend(
            **{"delta": None} | arguments,
            frequencies=jnp.ones(32),
            bias=None,
            positions=jnp.arange(128)[None],
            segment_ids=None,
            scale=1.0,
        )


@pytest.mark.parametrize(
    ("length", "block_q", "block_kv"),
    # Three of 2048 would be 6144; a tile of 1664 keys has no two halves.
    [(8192, 1024, 2048), (1024, 1024, 1024), (5000, 896, 1792), (1600, 896, 1792), (100, 128, 128)],
)
def test_blocks_fit_the_length(length: int, block_q: int, block_kv: int) -> None:
    fitted = fit(BlockSizes(block_kv=2048), length)
    assert (fitted.block_q, fitted.block_kv) == (block_q, block_kv)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", ["TPU v5", "TPU v6 lite", "cpu"])
def test_tiles_of_the_table_fit_every_length(kind: str, is_packed: bool) -> None:
    assert block_sizes(kind, 256, is_packed) == BlockSizes()
    of_table = block_sizes(kind, 128, is_packed)
    # On v6e nothing was better than the default for rows of several documents.
    assert (of_table == BlockSizes()) == (kind == "cpu" or (is_packed and "v6" in kind))
    assert not is_packed or of_table.block_q <= BlockSizes().block_q
    for length in (1, 300, 1025, 1600, 5000, 8192, 100_001):
        fitted = fit(of_table, length)
        for block, sub, most in (
            (fitted.block_q, fitted.sub_q, of_table.block_q),
            (fitted.block_kv, 128, of_table.block_kv),
            (fitted.block_q_backward, 128, of_table.block_q_backward),
            (fitted.block_kv_backward, fitted.sub_kv_backward, of_table.block_kv_backward),
        ):
            assert block % 128 == sub % 128 == block % sub == 0 and block <= most
    assert fit(of_table, 8192) == of_table


def test_what_it_cannot_do() -> None:
    narrow = jnp.zeros((1, 128, 2, 40))
    with pytest.raises(NotSupported, match="q: is 40 wide, must be a multiple of 16"):
        attend(
            narrow,
            narrow,
            narrow,
            frequencies=jnp.ones(20),
            delta=None,
            bias=None,
            positions=jnp.arange(128)[None],
            segment_ids=None,
            scale=1.0,
        )
