"""From a config to a model."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.config import schema
from vqcx_jax.maps import TokenMap
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model, build_model

MODEL = schema.Model(
    vocab_size=11,
    embed_dim=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    head=schema.VQHead(num_codes=3),
)
CONFIG = schema.Config(model=MODEL)
MAP = np.arange(11, dtype=np.int32) % 3


@pytest.fixture(scope="module")
def model() -> Any:
    centroids = np.arange(24, dtype=np.float32).reshape(3, 8)
    return jax.jit(
        lambda key: build_model(CONFIG, TokenMap(MAP[:, None], (3,), (centroids,)), key)
    )(jax.random.key(0))


def test_assignment_and_centroids_are_taken(model: Any) -> None:
    np.testing.assert_array_equal(model.head.assignment[...], MAP)
    np.testing.assert_array_equal(model.head.codes[...], np.arange(24.0).reshape(3, 8))


def test_layers_differ_at_the_start(model: Any) -> None:
    q = model.blocks.attention.q[...]
    assert q.shape == (2, 8, 2, 4)
    assert not np.array_equal(q[0], q[1])


def test_abstract_model_is_the_same_without_arrays(model: Any) -> None:
    abstract = abstract_model(CONFIG)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    assert functional.split(abstract)[0] == functional.split(model)[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(
        functional.split(abstract)[1:], functional.split(model)[1:]
    )


def test_same_key_same_model(model: Any) -> None:
    build = jax.jit(lambda key: build_model(CONFIG, TokenMap(MAP[:, None], (3,)), key))
    first, again, other = (build(jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(jax.tree.leaves(first), jax.tree.leaves(again))
    assert not np.array_equal(first.embedding.table[...], other.embedding.table[...])
    chex.assert_trees_all_equal(first.embedding.table[...], model.embedding.table[...])


def test_rules() -> None:
    rules = schema.ShardingRules(batch=("data",))
    assert abstract_model(CONFIG, rules).rules == rules
    config = dataclasses.replace(CONFIG, sharding=rules)
    head: Any = abstract_model(config).head
    assert head.rules == rules


def test_full_head_needs_no_map() -> None:
    model = dataclasses.replace(MODEL, head=schema.FullHead())
    head: Any = abstract_model(schema.Config(model=model)).head
    assert head.weights.shape == (11, 8)


def test_vocabulary_must_be_known() -> None:
    model = dataclasses.replace(MODEL, vocab_size=None)
    with pytest.raises(ValueError, match="model.vocab_size=None"):
        abstract_model(schema.Config(model=model))


def test_parameters_are_float32() -> None:
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    _, params, buffers = functional.split(abstract_model(schema.Config(model=model)))
    chex.assert_type(jax.tree.leaves(params), jnp.float32)
    chex.assert_type(jax.tree.leaves(buffers), jnp.int32)
