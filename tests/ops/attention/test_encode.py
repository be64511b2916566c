"""Complex attention as a dot product, against the definition of its scores."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcx_jax.ops.attention import (
    complex_queries_and_keys,
    complex_scores,
    euler_adapt,
    rope_frequencies,
    rope_queries_and_keys,
    rotary_table,
    rotate,
)

BATCH = 2


def make_inputs(
    num_heads: int, num_kv_heads: int, head_dim: int, length: int, dtype: Any = jnp.float32
) -> tuple[jax.Array, ...]:
    """q, k, delta and bias."""
    normal = np.random.default_rng(0).standard_normal
    return (
        jnp.asarray(normal((BATCH, length, num_heads, head_dim)), dtype),
        jnp.asarray(normal((BATCH, length, num_kv_heads, head_dim)), dtype),
        jnp.asarray(normal((num_kv_heads, head_dim // 2)), jnp.float32),
        jnp.asarray(normal((num_heads, head_dim // 2)), jnp.float32),
    )


def dot_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """(B, H, T, S): what an attention makes of queries and keys."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)


@jax.jit
def separable(q: Any, k: Any, delta: Any, bias: Any, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return dot_scores(*complex_queries_and_keys(q, k, cos, sin, delta, bias))


def definition(q: Any, k: Any, delta: Any, bias: Any, frequencies: Any, positions: Any) -> Any:
    """`complex_scores`, with each key head and its delta repeated for its group of queries."""
    group = q.shape[2] // k.shape[2]
    k, delta = jnp.repeat(k, group, axis=2), jnp.repeat(delta, group, axis=0)
    return complex_scores(q, k, delta, bias, frequencies, positions, positions)


def scores_and_gradients(scores: Any) -> Any:
    """The scores and their gradients by q, k, delta and bias, at a fixed cotangent."""

    def function(inputs: Any, cotangent: Any, *others: Any) -> Any:
        value, vjp = jax.vjp(lambda *x: scores(*x, *others), *inputs)
        return value, vjp(cotangent.astype(value.dtype))

    return function


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "length", "offset"),
    [
        (2, 2, 4, 7, 0),
        (6, 2, 6, 5, 11),
        (4, 1, 16, 5, 40),
        (2, 2, 256, 3, 0),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_and_gradients(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    length: int,
    offset: int,
    dtype: Any,
    in_float64: Any,
    max_error: Any,
) -> None:
    inputs = make_inputs(num_heads, num_kv_heads, head_dim, length, dtype)
    frequencies = rope_frequencies(head_dim)
    # Rows of a batch stand at different places, with a jump inside the row.
    positions = jnp.stack([offset + jnp.arange(length), 2 * jnp.arange(length)])
    shape = (BATCH, num_heads, length, length)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    value, gradients = jax.jit(scores_and_gradients(separable))(
        inputs, cotangent, *rotary_table(positions, frequencies)
    )
    true_value, true_gradients = in_float64(
        scores_and_gradients(definition), inputs, cotangent, frequencies, positions
    )
    # float32: an angle m omega <= 45 is rounded by 2^-19 = 2e-6 at q and at k, phases by less.
    # bfloat16: q', k' and the gradients by them are rounded to 2^-8 of each element, which is at
    # most 2^-7 of a product of two; sums over tokens average it.
    tolerance = 4e-6 if dtype == jnp.float32 else 2.0**-7
    assert max_error(value, true_value) <= tolerance
    for x, actual, expected in zip(inputs, gradients, true_gradients, strict=True):
        assert actual.dtype == x.dtype
        assert max_error(actual, expected) <= tolerance


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 9), (5, 3)])
def test_queries_and_keys_of_different_lengths(
    num_queries: int, num_keys: int, in_float64: Any, max_error: Any
) -> None:
    """As in decoding: the newest queries against the keys of a cache."""
    q, k, delta, bias = make_inputs(2, 2, 8, 9)
    q, k = q[:, :num_queries], k[:, :num_keys]
    frequencies = rope_frequencies(8)
    q_positions = jnp.broadcast_to(9 + jnp.arange(num_queries), (BATCH, num_queries))
    k_positions = jnp.broadcast_to(jnp.arange(num_keys), (BATCH, num_keys))

    @jax.jit
    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        q = rotate(euler_adapt(q, delta, bias), *rotary_table(q_positions, frequencies))
        k = rotate(euler_adapt(k, delta), *rotary_table(k_positions, frequencies))
        return dot_scores(q, k)

    expected = in_float64(complex_scores, q, k, delta, bias, frequencies, q_positions, k_positions)
    assert max_error(scores(q, k), expected) <= 1e-5


def test_delta_one_and_no_bias_is_rope() -> None:
    q, k, delta, bias = make_inputs(4, 2, 16, 6)
    table = rotary_table(jnp.arange(6)[None], rope_frequencies(16))
    delta, bias = jnp.ones_like(delta), jnp.zeros_like(bias)
    actual = jax.jit(complex_queries_and_keys)(q, k, *table, delta, bias)
    # There and back to polar coordinates: phases of up to pi, rounded to 2^-23.
    chex.assert_trees_all_close(actual, rope_queries_and_keys(q, k, *table), rtol=0, atol=3e-6)


def test_bfloat16_is_rounded_once() -> None:
    q, k, delta, bias = make_inputs(4, 2, 16, 6, jnp.bfloat16)
    table = rotary_table(jnp.arange(100, 106)[None], rope_frequencies(16))
    wide = complex_queries_and_keys(
        q.astype(jnp.float32), k.astype(jnp.float32), *table, delta, bias
    )
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    chex.assert_trees_all_equal(complex_queries_and_keys(q, k, *table, delta, bias), expected)


@jax.jit
def scores_at(inputs: Any, positions: jax.Array) -> jax.Array:
    return separable(*inputs, *rotary_table(positions, rope_frequencies(8)))


@settings(deadline=None, max_examples=30)
@given(
    starts=st.lists(st.integers(0, 1000), min_size=BATCH, max_size=BATCH),
    steps=st.lists(st.integers(0, 50), min_size=4, max_size=4),
    shift=st.integers(0, 100_000),
)
def test_scores_depend_on_distances_only(starts: list[int], steps: list[int], shift: int) -> None:
    inputs = make_inputs(2, 1, 8, 5)
    positions = jnp.asarray(starts)[:, None] + np.cumsum([0, *steps])
    here, there = scores_at(inputs, positions), scores_at(inputs, positions + shift)
    # An angle is as large as the position and rounded to 2^-24 of it; queries and keys, here and
    # there, each have such an error. |q| |k| bounds what a radian does to a score.
    radians = 4 * 2.0**-24 * (int(positions.max()) + shift) + 1e-6
    norms = [np.linalg.norm(x, axis=-1).max() for x in inputs[:2]]
    chex.assert_trees_all_close(here, there, rtol=0, atol=radians * norms[0] * norms[1])


def test_order_of_planes_does_not_matter() -> None:
    q, k, delta, bias = make_inputs(4, 2, 12, 5)
    frequencies = rope_frequencies(12)
    order = np.random.default_rng(2).permutation(6)
    both_halves = np.concatenate([order, order + 6])
    positions = jnp.broadcast_to(jnp.arange(5), (BATCH, 5))
    before = separable(q, k, delta, bias, *rotary_table(positions, frequencies))
    after = separable(
        q[..., both_halves],
        k[..., both_halves],
        delta[:, order],
        bias[:, order],
        *rotary_table(positions, frequencies[order]),
    )
    chex.assert_trees_all_close(after, before, rtol=0, atol=1e-5)


def test_delta_zero_leaves_amplitudes_and_positions() -> None:
    """The other end of the dial: no semantic phase, only |q| |k| cos(b + (m - n) omega)."""
    q, k, delta, bias = make_inputs(2, 2, 8, 5)
    frequencies = rope_frequencies(8)
    positions = jnp.broadcast_to(jnp.arange(5), (BATCH, 5))
    actual = separable(q, k, 0 * delta, bias, *rotary_table(positions, frequencies))
    q_radius, k_radius = (np.hypot(x[..., :4], x[..., 4:]) for x in (np.asarray(q), np.asarray(k)))
    distance = np.arange(5)[:, None] - np.arange(5)
    phase = np.asarray(bias)[:, None, None] + distance[..., None] * np.asarray(frequencies)
    expected = np.einsum("bthp,bshp,htsp->bhts", q_radius, k_radius, np.cos(phase))
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-5)
