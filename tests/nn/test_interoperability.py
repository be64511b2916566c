"""The library from the outside: Flax Linen, a user's own NNX module, plain arrays."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.nnx import bridge

from vqcx_jax.config import schema
from vqcx_jax.nn import Attention, VQHead
from vqcx_jax.ops import codebook
from vqcx_jax.ops.attention import (
    attend,
    causal_mask,
    complex_queries_and_keys,
    rope_frequencies,
    rotary_table,
)

DIM, HEADS, KV_HEADS, HEAD_DIM, CODES = 8, 4, 2, 6, 5
ASSIGNMENT = jnp.arange(13) % CODES
SHAPES = {
    "q": (DIM, HEADS, HEAD_DIM),
    "k": (DIM, KV_HEADS, HEAD_DIM),
    "v": (DIM, KV_HEADS, HEAD_DIM),
    "out": (HEADS, HEAD_DIM, DIM),
    "delta": (KV_HEADS, HEAD_DIM // 2),
    "attention_bias": (HEADS, HEAD_DIM // 2),
    "codes": (CODES, DIM),
    "token_bias": (13,),
}


@pytest.fixture(scope="module")
def params() -> dict[str, jax.Array]:
    normal = np.random.default_rng(0).standard_normal
    return {name: jnp.asarray(normal(shape), jnp.float32) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 7, DIM))


@pytest.fixture(scope="module")
def targets() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(13, size=(2, 7)))


def rotary() -> tuple[jax.Array, jax.Array]:
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    return rotary_table(positions, rope_frequencies(HEAD_DIM))


def plain_nll(p: dict[str, jax.Array], x: jax.Array, targets: jax.Array) -> jax.Array:
    """One attention and a VQ head from pure functions."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    q, k = complex_queries_and_keys(q, k, *rotary(), p["delta"], p["attention_bias"])
    y = attend(q, k, v, causal_mask(7, 7))
    h = x + jnp.einsum("bthk,hkd->btd", y, p["out"])
    return codebook.nll(h, p["codes"], ASSIGNMENT, targets, p["token_bias"])[0]


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, targets: jax.Array) -> jax.Array:
        init = linen.initializers.normal(1.0)
        p = {name: self.param(name, init, shape) for name, shape in SHAPES.items()}
        return plain_nll(p, x, targets)


class BridgedModel(linen.Module):
    """A Linen model with an output layer of ours as it is."""

    @linen.compact
    def __call__(self, x: jax.Array, targets: jax.Array) -> jax.Array:
        h = linen.Dense(DIM)(x)
        head = bridge.to_linen(VQHead, ASSIGNMENT, CODES, DIM)
        nll, _ = head(h, targets, nnx_method="nll")
        return nll


class NnxModel(nnx.Module):
    """A user's module that holds two of ours and one of Flax."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = Attention(
            DIM,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            attention=schema.ComplexAttention(),
            rngs=rngs,
        )
        self.dense = nnx.Linear(DIM, DIM, rngs=rngs)
        self.head = VQHead(ASSIGNMENT, CODES, DIM, rngs=rngs)

    def __call__(self, x: jax.Array, targets: jax.Array) -> jax.Array:
        y, _ = self.attention(x)
        return self.head.nll(self.dense(x + y), targets)[0]


@pytest.fixture(scope="module")
def plain_result(params: dict[str, jax.Array], x: jax.Array, targets: jax.Array) -> Any:
    return jax.jit(jax.value_and_grad(lambda p: plain_nll(p, x, targets).mean()))(params)


def test_plain_arrays_and_linen_agree(
    params: dict[str, jax.Array], x: jax.Array, targets: jax.Array, plain_result: Any
) -> None:
    model: Any = LinenModel()
    variables = jax.jit(model.init)(jax.random.key(0), x, targets)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables["params"], params)
    loss = jax.jit(jax.value_and_grad(lambda p: model.apply({"params": p}, x, targets).mean()))
    chex.assert_trees_all_close(loss(params), plain_result, rtol=1e-5, atol=1e-6)


def test_head_within_linen(x: jax.Array, targets: jax.Array) -> None:
    model: Any = BridgedModel()
    variables = model.init(jax.random.key(0), x, targets)
    buffers = variables.pop("Buffer")
    assert variables.keys() == {"params", "Param"}

    def loss(trained: Any) -> jax.Array:
        return model.apply({**trained, "Buffer": buffers}, x, targets).mean()

    before, gradients = jax.jit(jax.value_and_grad(loss))(variables)
    dense, head = variables["params"]["Dense_0"], linen.meta.unbox(variables["Param"])
    (head,) = head.values()
    h = x @ dense["kernel"] + dense["bias"]
    expected = codebook.nll(h, head["codes"], ASSIGNMENT, targets, head["bias"])[0].mean()
    chex.assert_trees_all_close(before, expected, rtol=1e-6)
    (of_head,) = linen.meta.unbox(gradients["Param"]).values()
    assert np.any(of_head["codes"]) and np.any(gradients["params"]["Dense_0"]["kernel"])


def test_nnx_modules_agree(
    params: dict[str, jax.Array], x: jax.Array, targets: jax.Array, plain_result: Any
) -> None:
    model: Any = nnx.eval_shape(lambda: NnxModel(nnx.Rngs(0)))
    names = ("q", "k", "v", "out")
    for name in names:
        getattr(model.attention, name).set_value(params[name])
    model.attention.encoding.delta.set_value(params["delta"])
    model.attention.encoding.bias.set_value(params["attention_bias"])
    model.dense.kernel.set_value(jnp.eye(DIM))
    model.dense.bias.set_value(jnp.zeros(DIM))
    model.head.codes.set_value(params["codes"])
    model.head.bias.set_value(params["token_bias"])
    model.head.assignment.set_value(ASSIGNMENT)

    value, gradients = nnx.jit(nnx.value_and_grad(lambda m: m(x, targets).mean()))(model)
    expected_value, expected = plain_result
    actual = {name: gradients["attention"][name][...] for name in names} | {
        "delta": gradients["attention"]["encoding"]["delta"][...],
        "attention_bias": gradients["attention"]["encoding"]["bias"][...],
        "codes": gradients["head"]["codes"][...],
        "token_bias": gradients["head"]["bias"][...],
    }
    assert "assignment" not in gradients["head"]
    chex.assert_trees_all_close((value, actual), (expected_value, expected), rtol=1e-5, atol=1e-6)


def test_training_a_users_nnx_module(x: jax.Array, targets: jax.Array) -> None:
    model = nnx.jit(lambda: NnxModel(nnx.Rngs(0)))()
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: NnxModel, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda m: m(x, targets).mean())(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    np.testing.assert_array_equal(model.head.assignment[...], ASSIGNMENT)
