"""The layer against a softmax over the definition of its scores, and its gradients at the edges."""

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kinds import (
    INPUTS,
    KINDS,
    POSITIONS,
    SEGMENTS,
    literal_attention,
    literal_weights,
    make_layer,
    with_random_parameters,
)
from flax import nnx
from versions import oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.errors import UserError
from vqcx_jax.nn import Attention, KVCache, functional

ALL = pytest.mark.parametrize("name", KINDS)
# Every function that rounds to bfloat16.
NARROW = ["complex_learned", "complex_window_soft_cap", "smooth_qk_norm", "harmonic3_per_head"]
NARROW += ["amplitude_linear", "rope_learned_yarn", "pope"]
COTANGENT = np.random.default_rng(2).standard_normal(INPUTS.shape, np.float32)


@cache
def layer_of(name: str, causal: bool = True, dtype: Any = jnp.float32) -> Attention:
    return with_random_parameters(lambda: make_layer(KINDS[name], causal=causal, dtype=dtype))


@partial(jax.jit, static_argnums=0)
def output_and_gradients(graphdef: Any, params: Any, x: jax.Array) -> Any:
    """Of two packed rows; gradients by the parameters and by x."""

    def output(params: Any, x: jax.Array) -> jax.Array:
        layer = nnx.merge(graphdef, params)
        return layer(x, layer.encoding.info(SEGMENTS, POSITIONS))[0]

    out, vjp = jax.vjp(output, params, x)
    return out, vjp(jnp.asarray(COTANGENT, out.dtype))


def literal(name: str, causal: bool) -> Any:
    def run(params: Any, x: Any, *others: Any) -> Any:
        *rows, cotangent = others
        function = partial(literal_attention, KINDS[name], causal)
        out, vjp = jax.vjp(lambda params, x: function(params, x, *rows), params, x)
        return out, vjp(cotangent)

    return run


BOTH_SIDES = ["complex_window_soft_cap", "alibi_window"]


@oldest_jax
@pytest.mark.parametrize(
    ("name", "causal"), [*((name, True) for name in KINDS), *((name, False) for name in BOTH_SIDES)]
)
def test_values_and_gradients(name: str, causal: bool, in_float64: Any, max_error: Any) -> None:
    graphdef, params, _ = functional.split(layer_of(name, causal))
    actual = output_and_gradients(graphdef, params, INPUTS)
    arguments = params, INPUTS, SEGMENTS, POSITIONS, COTANGENT
    expected = in_float64(literal(name, causal), *arguments)
    errors = jax.tree.map(max_error, actual, expected)
    for path, error in jax.tree.leaves_with_path(errors):
        assert error <= 1e-5, path


@oldest_jax
@ALL
def test_weights(name: str, in_float64: Any, max_error: Any) -> None:
    layer = layer_of(name)
    _, params, _ = functional.split(layer)
    info = layer.encoding.info(SEGMENTS, POSITIONS)
    weights = jax.jit(Attention.weights)(layer, INPUTS, info)
    function = partial(literal_weights, KINDS[name], True)
    expected = in_float64(function, params, INPUTS, SEGMENTS, POSITIONS)
    assert weights.dtype == jnp.float32
    assert max_error(weights, expected) <= 1e-5


@oldest_jax
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, jnp.float32) for name in KINDS), *((name, jnp.bfloat16) for name in NARROW)],
)
def test_gradients_of_zeros_are_finite(name: str, dtype: Any) -> None:
    graphdef, params, _ = functional.split(layer_of(name, dtype=dtype))
    zeros = jnp.zeros(INPUTS.shape, dtype)
    chex.assert_tree_all_finite(output_and_gradients(graphdef, params, zeros))


@oldest_jax
@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_is_near_float32(name: str, max_error: Any) -> None:
    x = jnp.asarray(INPUTS, jnp.bfloat16)
    wide, narrow = (functional.split(layer_of(name, dtype=t)) for t in (jnp.float32, x.dtype))
    actual = output_and_gradients(*narrow[:2], x)
    expected = output_and_gradients(*wide[:2], x.astype(jnp.float32))
    out, (by_params, by_x) = actual
    chex.assert_type([out, by_x], jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(by_params), jnp.float32)
    errors = jax.tree.map(max_error, actual, expected)
    # Projections, encodings, weights and output are rounded by 2^-9 at most. Four of these move a
    # score, and scores of 4, as here, move weights by four times as much: (4 * 4 + 3) * 2^-9 if
    # all went one way, less than half of it as they do not. Gradients pass about twice as many.
    assert errors[0] <= 2.0**-6
    for path, error in jax.tree.leaves_with_path(errors[1]):
        assert error <= 2.0**-4, path


@ALL
def test_only_projections_decay(name: str) -> None:
    mask = functional.decay_mask(nnx.eval_shape(lambda: make_layer(KINDS[name])))
    decayed = [path[0].key for path, decays in jax.tree.leaves_with_path(mask) if decays]
    assert sorted(decayed) == ["k", "out", "q", "v"]


def test_defaults_are_one_document_after_the_cache() -> None:
    apply = jax.jit(Attention.__call__)
    layer = layer_of("complex_learned")
    expected, own = apply(layer, INPUTS)
    ones = jnp.ones((2, 9), jnp.int32)
    explicit, _ = apply(layer, INPUTS, layer.encoding.info(ones, ones * jnp.arange(9)))
    chex.assert_trees_all_close(explicit, expected, rtol=0, atol=1e-6)
    cache = KVCache(*(jnp.zeros((2, 12, 2, 8)) for _ in range(2)))
    first, cache = apply(layer, INPUTS[:, :5], None, cache, 0)
    second, cache = apply(layer, INPUTS[:, 5:], None, cache, 5)
    actual = jnp.concatenate([first, second], axis=1)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-6)
    chex.assert_trees_all_close(KVCache(*(x[:, :9] for x in cache)), own, rtol=0, atol=1e-6)


def test_a_cache_needs_causal_attention() -> None:
    cache = KVCache(*(jnp.zeros((2, 12, 2, 8)) for _ in range(2)))
    with pytest.raises(UserError, match="cache: must be None for causal=False"):
        layer_of("rope", causal=False)(jnp.asarray(INPUTS), cache=cache)


def test_what_a_cache_cannot_do() -> None:
    layer, x = layer_of("rope"), jnp.asarray(INPUTS)
    cache = KVCache(*(jnp.zeros((2, 12, 2, 8)) for _ in range(2)))
    packed = layer.encoding.info(SEGMENTS, POSITIONS)
    with pytest.raises(UserError, match="info: must have segment_ids=None with a cache"):
        layer(x, packed, cache)
    with pytest.raises(UserError, match="cache: has room for 12 positions; 4 and 9 more do not"):
        layer(x, cache=cache, cache_length=4)
    for length in (np.int64(4), jnp.asarray(4)):
        with pytest.raises(UserError, match="cache: has room for 12 positions; 4 and 9 more do"):
            layer(x, cache=cache, cache_length=length)
    with pytest.raises(UserError, match="cache_length=-1: must be at least 0"):
        layer(x, cache=cache, cache_length=-1)
    wide = KVCache(jnp.zeros((2, 12, 2, 16)), cache.v)
    with pytest.raises(UserError, match="cache: has 2 heads with keys of 16 and values of 8; must"):
        layer(x, cache=wide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
        ({"num_kv_heads": 0}, "num_kv_heads=0: must be at least 1"),
        ({"attention": "pope"}, "attention='pope': must be one of config.schema"),
        (
            {"attention": schema.RopeAttention(extension="yarn", extension_factor=2.0)},
            "model.attention.trained_length=None: must be the positions of training",
        ),
        (
            {"attention": schema.RopeAttention(extension_factor=2.0)},
            "model.attention.extension_factor=2.0: must be 1",
        ),
        (
            {"attention": schema.RopeAttention(rope_fraction=0.02)},
            "fraction=0.02: no plane of 4 turns",
        ),
    ],
)
def test_sizes_and_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "attention": schema.RopeAttention()}
    with pytest.raises(UserError, match=message):
        layer = Attention(16, **(sizes | options), rngs=nnx.Rngs(0))
        layer(jnp.zeros((1, 2, 16)))


def test_activations_are_of_its_dtype() -> None:
    layer = layer_of("complex_learned", dtype=jnp.bfloat16)
    out, own = jax.jit(Attention.__call__)(layer, INPUTS)
    chex.assert_type([out, *own], jnp.bfloat16)
