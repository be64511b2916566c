"""Attention weights against a literal softmax, and their sums by distance against a loop."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.evaluation.attention_stats import (
    AttentionByDistance,
    attention_by_distance,
    attention_weights,
    learned_arrays,
)
from vqcx_jax.nn import Attention, Transformer, functional
from vqcx_jax.nn.transformer import Block
from vqcx_jax.ops import attention as ops

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, DIM = 4, 2, 8, 16
LEARNED: dict[str, Any] = {"frequencies": "per_head", "learned_frequencies": True}
YARN: dict[str, Any] = {"extension": "yarn", "extension_factor": 4.0, "trained_length": 64}
KINDS: dict[str, schema.AttentionConfig] = {
    "complex": schema.ComplexAttention(window=3),
    "complex_learned": schema.ComplexAttention(scaled=False, **LEARNED),
    "smooth": schema.SmoothAttention(qk_norm=True),
    "harmonic": schema.HarmonicAttention(num_harmonics=3, **YARN),
    "eulerformer": schema.EulerFormerAttention(),
    "amplitude": schema.AmplitudeAttention(),
    "rope": schema.RopeAttention(logit_soft_cap=0.7),
    "rope_learned": schema.RopeAttention(learned_frequencies=True),
    "pope": schema.PopeAttention(),
    "alibi": schema.AlibiAttention(window=4, logit_soft_cap=0.7),
    "nope": schema.NopeAttention(),
}
# The second row ends in padding.
BATCH = {
    "inputs": np.random.default_rng(1).integers(29, size=(2, 9), dtype=np.int32),
    "segment_ids": np.asarray([[1] * 4 + [2] * 5, [1] * 2 + [2] * 4 + [0] * 3], np.int32),
    "positions": np.asarray([[*range(4), *range(5)], [*range(2), *range(4), 0, 0, 0]], np.int32),
}
X = np.random.default_rng(2).standard_normal((2, 9, DIM), np.float32)


def with_random_parameters(module: Any) -> Any:
    normal = np.random.default_rng(0).standard_normal
    graphdef, params, buffers = functional.split(module)
    params = jax.tree.map(lambda p: jnp.asarray(0.4 * normal(p.shape), p.dtype), params)
    return nnx.merge(graphdef, params, buffers)


def make_layer(name: str) -> Attention:
    return with_random_parameters(
        Attention(
            DIM,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            attention=KINDS[name],
            rngs=nnx.Rngs(0),
        )
    )


def make_model(name: str) -> Transformer:
    config = schema.Model(
        vocab_size=29,
        embed_dim=DIM,
        num_layers=2,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        mlp_dim=24,
        attention=KINDS[name],
        head=schema.FullHead(),
    )
    return with_random_parameters(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def weights_and_output(layer: Attention) -> tuple[jax.Array, jax.Array]:
    info = layer.encoding.info(BATCH["segment_ids"], BATCH["positions"])
    return jax.jit(lambda layer: (attention_weights(layer, X, info), layer(X, info)[0]))(layer)


@jax.jit
def literal_scores(layer: Attention) -> jax.Array:
    """(B, H, T, T) by the definitions, scaled, before soft-cap, penalty and masks."""
    q, k = (jnp.einsum("btd,dhk->bthk", X, w[...]) for w in (layer.q, layer.k))
    k = jnp.repeat(k, NUM_HEADS // NUM_KV_HEADS, axis=2)
    encoding, positions = layer.encoding, BATCH["positions"]
    omega = ops.rope_frequencies(HEAD_DIM)
    match layer.options:
        case schema.ComplexAttention():
            delta = jnp.repeat(encoding.delta[...], NUM_HEADS // NUM_KV_HEADS, axis=0)
            scores = ops.complex_scores(
                q, k, delta, encoding.bias[...], omega, positions, positions
            )
        case schema.RopeAttention():
            scores = ops.rope_scores(q, k, omega, positions, positions)
        case schema.AlibiAttention():
            scores = jnp.einsum("bthk,bshk->bhts", q, k)
    return scores / math.sqrt(HEAD_DIM)


@pytest.mark.parametrize("name", ["complex", "rope", "alibi"])
def test_weights_are_the_softmax_of_the_scores(name: str) -> None:
    layer = make_layer(name)
    options = layer.options
    scores = literal_scores(layer)
    if options.logit_soft_cap is not None:
        scores = options.logit_soft_cap * jnp.tanh(scores / options.logit_soft_cap)
    distance = np.arange(9)[:, None] - np.arange(9)
    if name == "alibi":
        slopes = 2.0 ** (-8.0 * np.arange(1, NUM_HEADS + 1) / NUM_HEADS)
        scores -= slopes[:, None, None] * distance
    segments = BATCH["segment_ids"]
    visible = (segments[:, None, :, None] == segments[:, None, None, :]) & (distance >= 0)
    visible &= distance < (options.window or 9)
    expected = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    weights, _ = weights_and_output(layer)
    assert weights.dtype == jnp.float32
    chex.assert_trees_all_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_of_the_layer(name: str) -> None:
    layer = make_layer(name)
    weights, output = weights_and_output(layer)
    chex.assert_trees_all_close(jnp.sum(weights, axis=-1), jnp.ones((2, NUM_HEADS, 9)), rtol=1e-5)
    v = jnp.einsum("btd,dhk->bthk", X, layer.v[...])
    v = jnp.repeat(v, NUM_HEADS // NUM_KV_HEADS, axis=2)
    expected = jnp.einsum("bhts,bshk,hkd->btd", weights, v, layer.out[...])
    chex.assert_trees_all_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["complex", "rope"])
def test_sums_by_distance(name: str) -> None:
    """Two batches, of the rows one by one: the model's own layers, and a loop over all pairs."""
    model = make_model(name)
    window = KINDS[name].window or 9
    info = model.blocks.attention.encoding.info(BATCH["segment_ids"], BATCH["positions"])
    sums, pairs = np.zeros((2, NUM_HEADS, 9)), np.zeros(9)

    @jax.jit
    def run(block: Block, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = attention_weights(block.attention, block.attention_norm(x), info)
        return weights, block(x, info)[0]

    x = model.embed(BATCH["inputs"])
    for layer in range(2):
        block = jax.tree.map(lambda stacked, layer=layer: stacked[layer], model.blocks)
        weights, x = map(np.asarray, run(block, x))
        for row, query, key in np.ndindex(2, 9, 9):
            segment = BATCH["segment_ids"][row]
            if 0 <= query - key < window and segment[query] == segment[key] != 0:
                sums[layer, :, query - key] += weights[row, :, query, key]
                pairs[query - key] += layer == 0
    batches = [{name: x[row : row + 1] for name, x in BATCH.items()} for row in range(2)]
    actual = attention_by_distance(model, batches)
    np.testing.assert_allclose(actual.sums, sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(actual.pairs, pairs)
    # 15 tokens, each of which gives away a weight of 1.
    np.testing.assert_allclose(actual.sums.sum(axis=-1), 15, rtol=1e-6)
    assert actual.pairs[0] == 15


def test_means_of_buckets() -> None:
    sums, pairs = np.asarray([[[4.0, 3.0, 1.0, 0.0, 0.0]]]), np.asarray([8, 4, 4, 0, 0])
    by_distance = AttentionByDistance(sums, pairs)
    means = by_distance.means(np.asarray([0, 1, 3]))
    np.testing.assert_array_equal(means, [[[0.5, 0.5, np.nan]]])


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "complex": {"delta": (2, 2, 4), "bias": (2, 4, 4), "frequencies": (4,)},
    "complex_learned": {
        "delta": (2, 2, 4),
        "bias": (2, 4, 4),
        "log_ratio": (2, 2, 4),
        "frequencies": (2, 2, 4),
    },
    "smooth": {"a": (2, 2, 8), "bias": (2, 4, 4), "frequencies": (4,)},
    "harmonic": {"weights": (2, 4, 3, 4), "bias": (2, 4, 3, 4), "frequencies": (4,)},
    "eulerformer": {"delta": (2, 1), "bias": (2, 1), "frequencies": (4,)},
    "amplitude": {"bias": (2, 4, 4), "frequencies": (4,)},
    "rope": {"frequencies": (4,)},
    "rope_learned": {"log_ratio": (2, 4), "frequencies": (2, 4)},
    "pope": {"bias": (2, 4, 8)},
    "alibi": {},
    "nope": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_learned_arrays(name: str) -> None:
    model = make_model(name)
    arrays = learned_arrays(model)
    assert {name: array.shape for name, array in arrays.items()} == SHAPES[name]
    if "log_ratio" in arrays:
        first = ops.rope_frequencies(HEAD_DIM)
        if name == "complex_learned":
            first = ops.per_head_frequencies(NUM_KV_HEADS, HEAD_DIM)
        expected = first * np.exp(arrays["log_ratio"])
        np.testing.assert_allclose(arrays["frequencies"], expected, rtol=1e-6)
    if name == "harmonic":
        expected = ops.yarn_frequencies(ops.rope_frequencies(HEAD_DIM), 4.0, 64)
        np.testing.assert_allclose(arrays["frequencies"], expected, rtol=1e-6)
    if name == "pope":  # As they are used, and some were above 0.
        assert arrays["bias"].max() == 0.0 > arrays["bias"].min()
