"""Attention cut over rows, the sequence and heads gives the numbers of one device."""

import dataclasses
from functools import cache, partial
from typing import Any

import chex
import jax
import numpy as np
import pytest
from attention_kinds import INPUTS, KINDS, VOCAB_SIZE, extend, make_layer, make_model
from flax import nnx
from versions import newest_jax

from vqcx_jax import sharding
from vqcx_jax.config import schema
from vqcx_jax.errors import UserError
from vqcx_jax.nn import Attention, Transformer, functional

pytestmark = newest_jax

RULES = schema.ShardingRules(sequence=("sequence",))
MESHES = {
    "tensor2": {"tensor": 2},
    "sequence2": {"sequence": 2},
    "all": {"fsdp": 2, "tensor": 2, "sequence": 2},
}


def make_mesh(name: str, axis_type: str) -> jax.sharding.Mesh:
    shape = MESHES[name]
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    return sharding.make_mesh(shape, axis_type, devices)


def make_batch() -> dict[str, np.ndarray]:
    """Rows of 10 whose halves have parts of one document."""
    tokens = np.random.default_rng(1).integers(VOCAB_SIZE, size=(2, 2, 10), dtype=np.int32)
    return {
        "inputs": tokens[0],
        "targets": tokens[1],
        "segment_ids": np.asarray([[1] * 3 + [2] * 6 + [0], [1] * 8 + [2] * 2], np.int32),
        "positions": np.asarray([[*range(3), *range(6), 0], [*range(8), *range(2)]], np.int32),
    }


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef: Any, params: Any, buffers: Any, batch: Any) -> Any:
    """Also the hidden states, in the middle."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params, buffers)
        h = model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"])
        return model.head.summed_nll(h, batch["targets"], batch["segment_ids"] != 0)[0], h

    return jax.value_and_grad(loss, has_aux=True)(params)


@cache
def without_mesh(name: str) -> Any:
    return jax.device_get(loss_and_gradients(*functional.split(make_model(name)), make_batch()))


def assert_same(actual: Any, expected: Any) -> None:
    # Sums over rows, positions and heads are taken in another order.
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        error = np.abs(np.asarray(a, np.float64) - b).max()
        assert error <= 4e-6 * np.abs(b).max()


def laid_out(
    model: Transformer, mesh: jax.sharding.Mesh, rules: schema.ShardingRules
) -> tuple[Any, ...]:
    graphdef, *arrays = functional.split(model)
    return graphdef, *jax.device_put(tuple(arrays), functional.shardings(model, mesh, rules))


@pytest.mark.parametrize(
    ("name", "mesh_name", "axis_type"),
    [
        ("complex_learned", "all", "explicit"),
        ("complex_learned", "all", "auto"),
        ("harmonic3_per_head", "all", "explicit"),
        ("alibi_window", "all", "explicit"),
        ("alibi_window", "sequence2", "auto"),
        ("pope", "tensor2", "explicit"),
        ("complex_window_soft_cap", "sequence2", "explicit"),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(
    name: str, mesh_name: str, axis_type: str
) -> None:
    mesh = make_mesh(mesh_name, axis_type)
    rows = sharding.named_sharding(mesh, ("batch", "sequence"), RULES)
    with jax.set_mesh(mesh):
        arguments = laid_out(make_model(name, rules=RULES), mesh, RULES)
        (loss, h), gradients = loss_and_gradients(*arguments, jax.device_put(make_batch(), rows))
    assert_same(((loss, h), gradients), without_mesh(name))
    assert h.sharding.is_equivalent_to(rows, h.ndim)
    assert h.addressable_shards[0].data.shape[1] == 10 // mesh.shape["sequence"]


@pytest.mark.parametrize("name", KINDS)
def test_explicit_types_of_every_kind(name: str) -> None:
    """On an explicit mesh shardings are types: what cannot be laid out fails when traced."""
    mesh = make_mesh("all", "explicit")
    with jax.set_mesh(mesh):
        graphdef, params, buffers = laid_out(make_model(name, "bfloat16", rules=RULES), mesh, RULES)
        loss = partial(loss_and_gradients, graphdef)
        (_, h), gradients = jax.eval_shape(loss, params, buffers, make_batch())
    chex.assert_type(h, "bfloat16")
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, params)
    for gradient, param in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True):
        assert gradient.sharding.spec == param.sharding.spec


@pytest.mark.parametrize("name", ["complex_learned", "harmonic3_per_head", "alibi_window"])
def test_cache_on_a_mesh(name: str) -> None:
    """Heads are cut, rows and positions are not, as in `evaluation.sample`."""
    rules = dataclasses.replace(RULES, batch=(), sequence=())
    mesh, tokens = make_mesh("tensor2", "explicit"), make_batch()["inputs"][1:, :8]
    (_, expected), _ = without_mesh(name)
    with jax.set_mesh(mesh):
        model = nnx.merge(*laid_out(make_model(name, rules=rules), mesh, rules))
        cache = model.empty_cache(1, 9)
        first, cache = extend(model, tokens[:, :4], cache, 0)
        second, cache = extend(model, tokens[:, 4:], cache, 4)
    actual = np.concatenate([first, second], axis=1)
    chex.assert_trees_all_close(actual, expected[1:, :8], rtol=0, atol=1e-5)
    # One of two key heads.
    assert cache.k.addressable_shards[0].data.shape[:4] == (2, 1, 16, 1)


@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
@pytest.mark.parametrize("name", ["complex_learned", "alibi_window"])
def test_a_layer_of_its_own(name: str, axis_type: str) -> None:
    """Neither its weights nor its inputs need be laid out before."""
    layer = make_layer(KINDS[name], rules=RULES)
    x = np.random.default_rng(0).standard_normal((4, 8, INPUTS.shape[-1]), np.float32)
    expected, _ = jax.jit(Attention.__call__)(layer, x)
    with jax.set_mesh(make_mesh("all", axis_type)):
        actual, _ = jax.jit(Attention.__call__)(layer, x)
    chex.assert_trees_all_close(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-5)


def test_no_cache_of_a_sequence_that_is_cut() -> None:
    layer = make_layer(KINDS["complex_learned"], rules=RULES)
    x = jax.numpy.zeros((2, 4, INPUTS.shape[-1]))
    _, own = jax.eval_shape(Attention.__call__, layer, x)
    cache = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), own)
    with (
        jax.set_mesh(make_mesh("sequence2", "auto")),
        pytest.raises(UserError, match=r"cache: needs the sequence whole, sharding.sequence must"),
    ):
        layer(x, cache=cache)
