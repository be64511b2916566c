"""What every encoding makes of queries and keys: by its definition, and at its start."""

from itertools import cycle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kinds import INPUTS, KINDS, literal_scores, make_layer, with_random_parameters
from flax import nnx
from versions import oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.nn import Attention, functional
from vqcx_jax.nn.attention import Encoding, make_encoding
from vqcx_jax.nn.attention.phases import AmplitudeEncoding, ComplexEncoding
from vqcx_jax.nn.attention.rotary import RotaryEncoding
from vqcx_jax.ops.attention import rope_frequencies

# Query heads, key heads, head width and length.
SIZES = [(6, 2, 32, 7), (4, 4, 64, 9), (4, 1, 128, 5), (2, 2, 256, 3)]
QUERIES_AND_KEYS = np.split(
    np.random.default_rng(0).standard_normal((2, 6, 6, 16), np.float32), [4], 2
)


@jax.jit
def scores_of_layer(layer: Attention, x: jax.Array, positions: jax.Array) -> jax.Array:
    info = layer.encoding.info(jnp.zeros_like(positions), positions)
    return dot_products(layer.encoding, *layer.queries_and_keys(x, info))


@jax.jit
def scores_of_encoding(encoding: Encoding, q: jax.Array, k: jax.Array) -> jax.Array:
    positions = jnp.arange(q.shape[1])[None]
    info = encoding.info(jnp.zeros_like(positions), positions)
    return dot_products(encoding, *encoding(q, k, info))


def dot_products(encoding: Encoding, q: jax.Array, k: jax.Array) -> jax.Array:
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return jnp.einsum("bthd,bshd->bhts", q, k) * encoding.scale


@oldest_jax
@pytest.mark.parametrize(("name", "sizes"), [*zip(KINDS, cycle(SIZES), strict=False)])
def test_scores_are_the_definition(
    name: str, sizes: tuple[int, int, int, int], in_float64: Any, max_error: Any
) -> None:
    *heads, length = sizes
    layer = with_random_parameters(lambda: make_layer(KINDS[name], *heads))
    _, params, _ = functional.split(layer)
    # Rows stand at different places, with a jump inside the row.
    positions = jnp.stack([11 + jnp.arange(length), 2 * jnp.arange(length)])
    x = INPUTS[:, :length]

    def definition(*arrays: Any) -> jax.Array:
        return literal_scores(KINDS[name], *arrays)

    expected = in_float64(definition, params, x, positions)
    assert max_error(scores_of_layer(layer, x, positions), expected) <= 1e-5


def at_its_start(attention: schema.AttentionConfig) -> Encoding:
    return make_encoding(
        attention,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rules=schema.ShardingRules(),
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize(
    ("attention", "tolerance"),
    [
        # There and back to polar coordinates.
        (schema.ComplexAttention(), 2e-5),
        (schema.EulerFormerAttention(), 2e-5),
        (schema.EulerFormerAttention(share_planes=False), 2e-5),
        # Nothing is computed but queries and keys themselves; harmonics have zeros among them, so
        # that products are summed in another order.
        (schema.SmoothAttention(), 0.0),
        (schema.HarmonicAttention(num_harmonics=2), 2e-5),
        (schema.HarmonicAttention(num_harmonics=3), 2e-5),
        (schema.RopeAttention(learned_frequencies=True), 0.0),
    ],
)
def test_starts_as_rope(attention: Any, tolerance: float) -> None:
    rope = scores_of_encoding(at_its_start(schema.RopeAttention()), *QUERIES_AND_KEYS)
    actual = scores_of_encoding(at_its_start(attention), *QUERIES_AND_KEYS)
    chex.assert_trees_all_close(actual, rope, rtol=0, atol=tolerance)


@pytest.mark.parametrize("learned", [False, True])
def test_first_of_several_heads_starts_as_rope(learned: bool) -> None:
    attention = schema.SmoothAttention(frequencies="per_head", learned_frequencies=learned)
    encoding = at_its_start(attention)
    assert isinstance(encoding, RotaryEncoding)
    first, second = encoding.frequencies()
    np.testing.assert_array_equal(first, rope_frequencies(16))
    assert np.all(second < first)


def test_amplitude_is_complex_without_delta() -> None:
    amplitude = at_its_start(schema.AmplitudeAttention())
    none = at_its_start(schema.ComplexAttention())
    assert isinstance(amplitude, AmplitudeEncoding) and isinstance(none, ComplexEncoding)
    none.delta[...] = jnp.zeros_like(none.delta[...])
    none.bias[...] = amplitude.bias[...] = jnp.linspace(-3, 3, 32).reshape(4, 8)
    actual, expected = (scores_of_encoding(x, *QUERIES_AND_KEYS) for x in (amplitude, none))
    # Amplitudes are off by EPSILON^2 / 2 over themselves: 1e-5 for the smallest here, of 0.05.
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=5e-5)
