"""The turn of complex attention: the Hopper kernel, interpreted, against the formula."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from versions import newest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import attention, device, dispatch
from vqcx_jax.ops.euler_turn import mosaic_gpu, queries_and_keys
from vqcx_jax.ops.euler_turn.block_sizes import BlockSizes, Tile
from vqcx_jax.sharding import make_mesh


class Case(NamedTuple):
    """Of B rows of T positions, H query heads and K key heads of width d."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    shared_planes: bool = False  # As in EulerFormer.
    per_head: bool = False  # Frequencies of each key head.


# Lengths that are no multiple of a tile's rows, and more than one block of tiles.
CASES = {
    "grouped": Case(2, 70, 4, 2, 64),
    "frequencies_of_heads": Case(1, 19, 4, 2, 32, per_head=True),
    "eulerformer": Case(1, 300, 2, 2, 128, shared_planes=True),
}


def make(case: Case, dtype: Any) -> tuple[Any, Any]:
    """Arguments and cotangents; some queries are 0 and some keys subnormal."""
    rng = np.random.default_rng(0)
    shapes = [(case.batch, case.length, n, case.head_dim) for n in (case.heads, case.kv_heads)]
    q, k, d_q, d_k = (rng.standard_normal(shape) for shape in 2 * shapes)
    q[:, ::7] = 0
    k[:, ::5, :, ::3] *= 1e-40
    positions = jnp.asarray(rng.integers(0, 5000, (case.batch, case.length)))
    frequencies = attention.rope_frequencies(case.head_dim)
    if case.per_head:
        frequencies = attention.per_head_frequencies(case.kv_heads, case.head_dim)
    planes = (1,) if case.shared_planes else (case.head_dim // 2,)
    of_keys = planes if case.shared_planes else (case.kv_heads, *planes)
    of_queries = planes if case.shared_planes else (case.heads, *planes)
    delta = jnp.asarray(1 + 0.3 * rng.standard_normal(of_keys), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(of_queries), jnp.float32)
    q, k, d_q, d_k = (jnp.asarray(x, dtype) for x in (q, k, d_q, d_k))
    return (q, k, *attention.rotary_table(positions, frequencies), delta, bias), (d_q, d_k)


def values_and_gradients(function: Any, args: Any, cotangents: Any) -> Any:
    result, pull_back = jax.vjp(function, *args)
    return result, pull_back(cotangents)


kernel = functools.partial(queries_and_keys, implementation="mosaic_gpu")


@newest_jax
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_float32(case: Case, hopper: None, in_float64: Any, max_error: Any) -> None:
    """Results, and gradients by queries, keys, tables, delta and bias."""
    args, cotangents = make(case, jnp.float32)
    formula = functools.partial(values_and_gradients, attention.complex_queries_and_keys)
    expected = in_float64(formula, args, cotangents)
    actual = jax.tree.map(np.asarray, values_and_gradients(kernel, args, cotangents))
    errors = [
        max_error(a, e) for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
    ]
    assert max(errors) <= 1e-5


@newest_jax
def test_other_tiles(
    hopper: None, in_float64: Any, max_error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of three small tiles, and of one large tile in the backward pass."""
    used, plan = [], mosaic_gpu._plan
    monkeypatch.setattr(mosaic_gpu, "_plan", lambda *a: used.append(plan(*a)) or used[-1])
    args, cotangents = make(CASES["grouped"], jnp.float32)
    formula = functools.partial(values_and_gradients, attention.complex_queries_and_keys)
    expected = in_float64(formula, args, cotangents)
    other = functools.partial(
        mosaic_gpu.queries_and_keys, blocks=BlockSizes(Tile(512, 3), Tile(4096, 1))
    )
    actual = jax.tree.map(np.asarray, values_and_gradients(other, args, cotangents))
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert max_error(a, e) <= 1e-5
    # Of 32 planes; queries and keys.
    assert [(p.rows, p.steps) for p in used] == [(16, 3)] * 2 + [(128, 1)] * 2


@newest_jax
@pytest.mark.parametrize(
    ("blocks", "error"),
    [
        (BlockSizes(forward=Tile(1000, 8)), "size=1000 of the forward tile: must be a multiple"),
        (BlockSizes(backward=Tile(128, 0)), "steps=0 of the backward tile: must be at least 1"),
    ],
)
def test_tiles_that_cannot_be(hopper: None, blocks: BlockSizes, error: str) -> None:
    args, _ = make(CASES["grouped"], jnp.float32)
    with pytest.raises(UserError, match=error):
        mosaic_gpu.queries_and_keys(*args, blocks=blocks)


@newest_jax
def test_bfloat16(hopper: None, in_float64: Any, max_error: Any) -> None:
    """Not farther from the formula than plain JAX in bfloat16."""
    args, cotangents = make(Case(1, 33, 2, 1, 256), jnp.bfloat16)
    formula = functools.partial(values_and_gradients, attention.complex_queries_and_keys)
    expected = jax.tree.leaves(in_float64(formula, args, cotangents))
    plain = jax.tree.leaves(jax.jit(formula)(args, cotangents))
    actual = jax.tree.leaves(values_and_gradients(kernel, args, cotangents))
    assert [x.dtype for x in actual] == [x.dtype for x in plain]
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert max_error(a, e) <= 2 * max_error(p, e) + 1e-6


@newest_jax
def test_within_shard_map(hopper: None, max_error: Any) -> None:
    """Of one device: the interpreter mixes up the barriers of several."""
    args, cotangents = make(Case(2, 9, 4, 2, 32), jnp.float32)
    mesh = make_mesh({"data": 1, "tensor": 1}, "auto", jax.devices()[:1])
    heads, table = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    planes = PartitionSpec("tensor")
    sharded = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(heads, heads, table, table, planes, planes),
        out_specs=(heads, heads),
    )
    expected = values_and_gradients(attention.complex_queries_and_keys, args, cotangents)
    actual = jax.jit(functools.partial(values_and_gradients, sharded))(args, cotangents)
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert max_error(a, np.asarray(e, np.float64)) <= 1e-5


def test_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _ = make(CASES["grouped"], jnp.float32)
    with pytest.raises(UserError, match="implementation='mosaic_gpu': needs a gpu"):
        kernel(*args)
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA A100"))
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.raises(UserError, match="device 'NVIDIA A100': kernels are for Hopper GPUs"):
        kernel(*args)
    with pytest.warns(UserWarning, match="not by mosaic_gpu"), dispatch.record() as traced:
        queries_and_keys(*args)
    assert traced == [("euler_turn.queries_and_keys", "xla")]


@newest_jax
def test_widths_that_it_does_not_have(hopper: None) -> None:
    args, _ = make(Case(1, 8, 2, 2, 48), jnp.float32)
    with pytest.raises(UserError, match="head_dim=48: must be 32, 64, 128 or 256"):
        kernel(*args)
