"""RMSNorm, Embedding, MLP and Attention at their start, against numpy."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.nn import MLP, Attention, Embedding, RMSNorm

RULES = schema.ShardingRules()


def make_attention(**changes: Any) -> Attention:
    options = dict(num_heads=4, num_kv_heads=2, head_dim=16, num_layers=3, rules=RULES)
    return Attention(
        64,
        **{**options, "attention": schema.ComplexAttention(), **changes},
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


def test_rms_norm() -> None:
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 3, 8)), rng.standard_normal(8)
    norm = RMSNorm(8, epsilon=1e-3, rules=RULES)
    np.testing.assert_array_equal(norm.scale[...], 1.0)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
    chex.assert_trees_all_close(norm(jnp.asarray(x, jnp.float32)), expected, rtol=0, atol=1e-6)


def test_rms_norm_of_bfloat16_is_rounded_once() -> None:
    x = (300 * jax.random.normal(jax.random.key(0), (1, 3, 64))).astype(jnp.bfloat16)
    norm = RMSNorm(64, epsilon=1e-6, rules=RULES)
    chex.assert_trees_all_equal(norm(x), norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rms_norm_of_zeros_is_zero() -> None:
    norm = RMSNorm(8, epsilon=1e-6, rules=RULES)
    value, gradient = jax.value_and_grad(lambda x: norm(x).sum())(jnp.zeros((1, 1, 8)))
    assert value == 0
    chex.assert_tree_all_finite(gradient)


def test_embedding() -> None:
    embedding = Embedding(50, 64, dtype=jnp.bfloat16, rules=RULES, rngs=nnx.Rngs(0))
    tokens = jnp.asarray([[3, 3, 49], [0, 1, 2]])
    rows = np.asarray(embedding.table[...].astype(jnp.bfloat16))[np.asarray(tokens)]
    chex.assert_trees_all_equal(np.asarray(embedding(tokens)), rows)
    assert np.std(embedding.table[...]) == pytest.approx(0.02, rel=0.05)


def test_mlp() -> None:
    mlp = MLP(8, 12, num_layers=2, dtype=jnp.float32, rules=RULES, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((2, 3, 8))
    gate, up, down = (np.asarray(w[...], np.float64) for w in (mlp.gate, mlp.up, mlp.down))
    expected = (x @ gate * scipy.special.expit(x @ gate) * (x @ up)) @ down
    chex.assert_trees_all_close(mlp(jnp.asarray(x, jnp.float32)), expected, rtol=0, atol=1e-6)


def test_initial_deviations() -> None:
    """1/sqrt(fan_in), and 1/sqrt(2 num_layers) of that for what writes to the residual stream."""
    mlp = MLP(64, 256, num_layers=3, dtype=jnp.float32, rules=RULES, rngs=nnx.Rngs(0))
    attention = make_attention()
    expected = {
        "gate": (mlp.gate, 1 / 8),
        "up": (mlp.up, 1 / 8),
        "down": (mlp.down, 1 / 16 / 6**0.5),
        "q": (attention.q, 1 / 8),
        "k": (attention.k, 1 / 8),
        "v": (attention.v, 1 / 8),
        "out": (attention.out, 1 / 8 / 6**0.5),
    }
    for name, (weight, deviation) in expected.items():
        # From 2048 samples on, a deviation is known to 1.6%.
        assert np.std(weight[...]) == pytest.approx(deviation, rel=0.06), name
    assert not np.array_equal(mlp.gate[...], mlp.up[...])


def test_initial_phases() -> None:
    one = make_attention()
    assert one.encoding.delta.shape == (2, 8)
    assert one.encoding.bias.shape == (4, 8)
    np.testing.assert_array_equal(one.encoding.delta[...], 1.0)
    np.testing.assert_array_equal(one.encoding.bias[...], 0.0)
    published = make_attention(
        num_heads=64,
        num_kv_heads=64,
        attention=schema.ComplexAttention(delta_init="published"),
    )
    # N(0, 1/sqrt(P)) with P = 8; 512 samples tell the deviation to 3%.
    assert np.std(published.encoding.delta[...]) == pytest.approx(8**-0.5, rel=0.12)
    np.testing.assert_array_equal(published.encoding.bias[...], 0.0)
    assert not hasattr(make_attention(attention=schema.RopeAttention()).encoding, "delta")
