"""Heads on device meshes: what one device gives, wherever arrays lie."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from head_kinds import WITH_EVERY_JAX, make_head, new_head, nll_and_gradient
from versions import oldest_jax

from vqcx_jax import sharding
from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn import Head, functional


@jax.jit
def top_4(head: Head, h: jax.Array) -> Any:
    return head.top_k(h, 4)


@jax.jit
def samples(head: Head, h: jax.Array) -> Any:
    options: tuple[Any, ...] = ({}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9})
    return [head.sample(h, jax.random.key(0), **o) for o in options]


@pytest.mark.parametrize(
    ("kind", "axis_type"),
    [
        *(
            pytest.param(kind, "explicit", marks=oldest_jax)
            for kind in (
                "class_vq",
                "vq",
                "full",
                "streamed",
                "adaptive",
                "huffman",
                "own_and_product",
            )
        ),
        ("vq", "auto"),
        pytest.param("full", "auto", marks=oldest_jax),
    ],
)
def test_top_k_and_samples_on_a_mesh(kind: str, axis_type: str) -> None:
    """Of a batch that is sharded as in training; samples also of a whole one, and of cut rows."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    h = jax.random.normal(jax.random.key(1), (4, 2, 8))
    cases = [(top_4, ShardingRules()), (samples, ShardingRules())]
    if kind in WITH_EVERY_JAX:
        cases.append((samples, ShardingRules(batch=())))
    if kind == "vq":
        cases.append((samples, ShardingRules(batch=(), sequence=("tensor",))))
    for function, rules in cases:
        head = new_head(kind, 12, rules=rules)
        expected = function(head, h)
        graphdef, *arrays = functional.split(head)
        with jax.set_mesh(mesh):
            arrays = jax.device_put(tuple(arrays), functional.shardings(head, mesh, rules))
            batch = sharding.named_sharding(mesh, ("batch", "sequence", None), rules)
            actual = function(nnx.merge(graphdef, *arrays), jax.device_put(h, batch))
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)
        if function is samples and axis_type == "explicit":
            rows = sharding.named_sharding(mesh, ("batch", "sequence"), rules)
            assert all(x.sharding.is_equivalent_to(rows, x.ndim) for x in actual)


@pytest.mark.parametrize("kind", WITH_EVERY_JAX)
def test_hidden_states_that_are_laid_out_otherwise(kind: str) -> None:
    """On an Explicit mesh those of a model of one's own may be whole where the rules cut them."""
    h, targets = jax.random.normal(jax.random.key(1), (4, 2, 8)), jnp.zeros((4, 2), int)
    expected = new_head(kind, 12).nll(h, targets)
    with jax.set_mesh(sharding.make_mesh({"data": 4, "fsdp": 2})):
        head = new_head(kind, 12, rules=ShardingRules(batch=("data",), embed=()))
        actual = jax.jit(lambda head, h, targets: head.nll(h, targets))(head, h, targets)
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_a_mesh_with_other_axes(axis_type: str) -> None:
    """Of another program, which cuts rows over "data" and has no axes of the other names."""
    h, targets = jax.random.normal(jax.random.key(1), (4, 2, 8)), jnp.zeros((4, 2), int)
    head = make_head("vq", True)
    expected = nll_and_gradient(head, h, targets)
    mesh = jax.make_mesh((4, 2), ("data", "x"), axis_types=(jax.sharding.AxisType[axis_type],) * 2)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, jax.P("data"))
        actual = nll_and_gradient(make_head("vq", True), jax.device_put(h, rows), targets)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
@pytest.mark.parametrize("kind", WITH_EVERY_JAX)
def test_batches_that_the_devices_do_not_divide(kind: str, axis_type: str) -> None:
    h, targets = jnp.zeros((6, 2, 8)), jnp.zeros((6, 2), int)
    message = r"batch of 6 must be a multiple of 8, the devices of the mesh axes data, fsdp"
    with jax.set_mesh(sharding.make_mesh({"data": 4, "fsdp": 2}, axis_type)):
        head = new_head(kind, 12)
        with pytest.raises(UserError, match=message):
            head.nll(h, targets)
        with pytest.raises(UserError, match=message):
            head.summed_nll(h, targets, jnp.ones((6, 2), bool))
        with pytest.raises(UserError, match=message):
            head.log_probs(h, targets[..., None])


def test_vocabularies_that_the_devices_do_not_divide() -> None:
    h, targets = jnp.zeros((4, 2, 8)), jnp.zeros((4, 2), int)
    message = r"shape \(11, 8\): vocab of 11 must be a multiple of 2, the devices of .* axes tensor"
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    with jax.set_mesh(mesh), pytest.raises(UserError, match=message):
        new_head("streamed").nll(h, targets)
