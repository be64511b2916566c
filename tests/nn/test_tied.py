"""A head whose rows are the input embedding's: one table in every respect."""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.nn import Transformer, functional
from vqcx_jax.nn.build import abstract_model, build_model
from vqcx_jax.nn.loss import summed_nll

pytestmark = oldest_jax

MODEL = schema.Model(
    vocab_size=11,
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_dim=8,
    head=schema.FullHead(tied=True, token_bias=True),
)
UNTIED = dataclasses.replace(MODEL, head=schema.FullHead(token_bias=True))
ROWS = np.random.default_rng(0).integers(11, size=(2, 2, 5), dtype=np.int32)
BATCH = {
    "inputs": ROWS[0],
    "targets": ROWS[1],
    "segment_ids": np.ones((2, 5), np.int32),
    "positions": np.tile(np.arange(5, dtype=np.int32), (2, 1)),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Transformer:
    config = schema.Config(model=dataclasses.replace(MODEL, dtype=request.param))
    built = jax.jit(lambda: build_model(config, None, jax.random.key(0)))()
    built.head.weights[...] *= 20.0
    return built


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(graphdef: nnx.GraphDef, params: Any) -> Any:
    return jax.value_and_grad(lambda p: summed_nll(graphdef, p, {}, BATCH, 0.1)[0])(params)


def test_gradient_is_the_sum_of_both_uses(model: Transformer) -> None:
    graphdef, params, _ = functional.split(model)
    loss, gradients = loss_and_gradients(graphdef, params)
    untied = dataclasses.replace(UNTIED, dtype=model.config.dtype)
    graphdef, _, _ = functional.split(abstract_model(schema.Config(model=untied)))
    table = params["head"]["weights"]
    expected_loss, expected = loss_and_gradients(graphdef, params | {"embedding": {"table": table}})
    of_input = expected.pop("embedding")["table"]
    assert np.any(of_input)
    expected["head"]["weights"] += of_input
    exact = model.config.dtype == "float32"
    # In bfloat16 the two are added in bfloat16, before they are widened.
    chex.assert_trees_all_close(
        (loss, gradients), (expected_loss, expected), rtol=0, atol=1e-5 if exact else 0.05
    )


def test_there_is_one_table() -> None:
    tied = abstract_model(schema.Config(model=MODEL))
    _, params, _ = functional.split(tied)
    assert sorted(params) == ["blocks", "final_norm", "head"]
    assert {n: p.shape for n, p in params["head"].items()} == {"weights": (11, 8), "bias": (11,)}
    assert functional.decay_mask(tied)["head"] == {"weights": True, "bias": False}
    _, untied, _ = functional.split(abstract_model(schema.Config(model=UNTIED)))
    del untied["embedding"]
    chex.assert_trees_all_equal_shapes(params, untied)


def test_stays_one_through_transformations_of_the_module(model: Transformer) -> None:
    """A module is a pytree: a step on its leaves must not split the table."""

    @jax.jit
    def step(model: Transformer) -> Transformer:
        gradient = jax.grad(lambda m: m.head.nll(m.hidden(ROWS[0]), ROWS[1])[0].mean())(model)
        return jax.tree.map(lambda p, g: p - 0.1 * g, model, gradient)

    stepped = step(model)
    assert stepped.embedding is None
    rows = stepped.hidden(ROWS[0])
    graphdef, params, buffers = functional.split(stepped)
    chex.assert_trees_all_equal(nnx.merge(graphdef, params, buffers).hidden(ROWS[0]), rows)
    assert not np.array_equal(stepped.head.weights[...], model.head.weights[...])


def test_decoding_reads_the_same_table(model: Transformer) -> None:
    h, _ = model.extend(ROWS[0], model.empty_cache(2, 5), 0)
    assert h.dtype == jnp.dtype(model.config.dtype)
    h, expected = (np.asarray(x, np.float32) for x in (h, model.hidden(ROWS[0])))
    atol = 1e-5 if model.config.dtype == "float32" else 0.05
    chex.assert_trees_all_close(h, expected, rtol=0, atol=atol)
