"""A model of every kind, small enough to compile in a second."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.nn import Transformer, functional

ATTENTIONS: dict[str, Any] = {"complex": schema.ComplexAttention(), "rope": schema.RopeAttention()}
HEADS: dict[str, Any] = {"vq": schema.VQHead(num_codes=7), "full": schema.FullHead(token_bias=True)}


@pytest.fixture(params=ATTENTIONS.keys())
def attention(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=HEADS.keys())
def head(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_config() -> Callable[..., schema.Model]:
    def make(attention: str = "complex", head: str = "vq", **changes: Any) -> schema.Model:
        sizes = dict(embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
        return schema.Model(
            **{**sizes, "vocab_size": 29, "mlp_dim": 24, **changes},
            attention=ATTENTIONS[attention],
            head=HEADS[head],
        )

    return make


@pytest.fixture(scope="session")
def abstract_transformer() -> Callable[[schema.Model], Transformer]:
    def make(config: schema.Model) -> Transformer:
        return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))

    return make


@pytest.fixture(scope="session")
def make_model(
    make_config: Callable[..., schema.Model],
    abstract_transformer: Callable[[schema.Model], Transformer],
) -> Callable[..., Transformer]:
    """A Transformer whose every parameter is random, biases and phases included."""

    @cache
    def make(**options: Any) -> Transformer:
        rng = np.random.default_rng(0)
        graphdef, params, buffers = functional.split(abstract_transformer(make_config(**options)))
        params = jax.tree.map(
            lambda p: jnp.asarray(0.4 * rng.standard_normal(p.shape), p.dtype), params
        )
        buffers = jax.tree.map(lambda b: jnp.arange(b.size, dtype=b.dtype) % 7, buffers)
        return nnx.merge(graphdef, params, buffers)

    return make


@pytest.fixture(scope="session")
def batch() -> dict[str, jax.Array]:
    """Two packed rows, the second one padded."""
    rng = np.random.default_rng(1)
    inputs, targets = jnp.asarray(rng.integers(29, size=(2, 2, 9)), jnp.int32)
    return {
        "inputs": inputs,
        "targets": targets,
        "segment_ids": jnp.asarray([[1] * 4 + [2] * 5, [1] * 2 + [2] * 4 + [0] * 3], jnp.int32),
        "positions": jnp.asarray(
            [[*range(4), *range(5)], [*range(2), *range(4), 0, 0, 0]], jnp.int32
        ),
    }
