"""Every encoding as a dot product, against the definition of its scores."""

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    NUM_HARMONICS,
    PROPERTY,
    VARIANTS,
    definition,
    dot_scores,
    fast_scores,
    make_inputs,
    table,
)
from versions import oldest_jax

from vqcx_jax.ops.attention import (
    complex_scores,
    euler_adapt,
    rope_frequencies,
    rotary_table,
    rotate,
)

pytestmark = oldest_jax

ALL = pytest.mark.parametrize("name", VARIANTS)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


@cache  # A function compiled for one dtype serves the next test, too.
def scores_and_gradients(scores: Any) -> Any:
    """The scores and their gradients by q, k and parameters, at a fixed cotangent."""

    def function(inputs: Any, cotangent: Any, *others: Any) -> Any:
        value, vjp = jax.vjp(lambda q, k, *p: scores(q, k, p, *others), *inputs)
        return value, vjp(cotangent.astype(value.dtype))

    return function


@cache
def fast(name: str) -> Any:
    return jax.jit(scores_and_gradients(partial(fast_scores, name)))


@cache
def literal(name: str) -> Any:
    return scores_and_gradients(partial(definition, name))


def random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)


@ALL
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "length", "offset", "dtype"),
    [
        (2, 2, 32, 7, 0, jnp.float32),
        (6, 2, 64, 5, 11, jnp.float32),
        (4, 1, 128, 5, 30, jnp.float32),
        (6, 2, 64, 5, 11, jnp.bfloat16),
    ],
)
def test_scores_and_gradients(
    name: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    length: int,
    offset: int,
    dtype: Any,
    in_float64: Any,
    max_error: Any,
) -> None:
    inputs = make_inputs(name, num_heads, num_kv_heads, head_dim, length, dtype)
    # Rows of a batch stand at different places, with a jump inside the row.
    positions = jnp.stack([offset + jnp.arange(length), 2 * jnp.arange(length)])
    cotangent = random(2, num_heads, length, length)
    value, gradients = fast(name)(inputs, cotangent, *table(name, head_dim, positions))
    frequencies = VARIANTS[name].frequencies(head_dim)
    true_value, true_gradients = in_float64(
        literal(name), inputs, cotangent, frequencies, positions, positions
    )
    # float32: an angle m omega <= 35 is rounded by 2^-19 = 2e-6 at q and at k, phases by less.
    # bfloat16: q', k' and the gradients by them are rounded to 2^-8 of each element, which is at
    # most 2^-7 of a product of two; sums over tokens average it.
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-7
    assert max_error(value, true_value) <= tolerance
    for x, actual, expected in zip(inputs, gradients, true_gradients, strict=True):
        assert actual.dtype == x.dtype
        assert max_error(actual, expected) <= tolerance


@ALL
def test_late_queries_of_a_long_row(name: str, in_float64: Any, max_error: Any) -> None:
    """2048 keys, as of a long document, and its last queries: scores, and all gradients."""
    length, num_queries, head_dim = 2048, 3, 128
    q, *others = make_inputs(name, 1, 1, head_dim, length)
    positions = jnp.broadcast_to(jnp.arange(length), (2, length))
    late = slice(length - num_queries, None)
    inputs = q[:, late], *others
    cotangent = random(2, 1, num_queries, length)
    frequencies = VARIANTS[name].frequencies(head_dim)

    def late_scores(q: jax.Array, k: jax.Array, parameters: Any) -> jax.Array:
        # Encodings take queries and keys of the same positions.
        q = jnp.pad(q, ((0, 0), (length - num_queries, 0), (0, 0), (0, 0)))
        tables = rotary_table(positions, frequencies)
        q, k = VARIANTS[name].encode(q, k, *tables, *parameters)
        return dot_scores(q[:, late], k)

    value, gradients = jax.jit(scores_and_gradients(late_scores))(inputs, cotangent)
    true_value, true_gradients = in_float64(
        literal(name), inputs, cotangent, frequencies, positions[:, late], positions
    )
    assert max_error(value, true_value) <= 1e-5
    for actual, expected in zip(gradients, true_gradients, strict=True):
        assert max_error(actual, expected) <= 1e-5


@ALL
def test_frequencies_of_each_key_head(name: str, in_float64: Any, max_error: Any) -> None:
    """Learned ones: values, and gradients by the frequencies too."""
    q, k, *parameters = make_inputs(name, 4, 2, 16, 5)
    shared = VARIANTS[name].frequencies(16)
    frequencies = jnp.stack([shared, 0.3 * shared])
    positions = jnp.stack([jnp.arange(5), 9 + jnp.arange(5)])

    def of_frequencies(q: Any, k: Any, others: Any, positions: Any) -> jax.Array:
        frequencies, *parameters = others
        return fast_scores(name, q, k, parameters, *rotary_table(positions, frequencies))

    def definition_of_frequencies(q: Any, k: Any, others: Any, positions: Any) -> Any:
        frequencies, *parameters = others
        return definition(name, q, k, parameters, frequencies, positions, positions)

    arguments = (q, k, frequencies, *parameters), random(2, 4, 5, 5), positions
    value, gradients = jax.jit(scores_and_gradients(of_frequencies))(*arguments)
    true_value, true_gradients = in_float64(
        scores_and_gradients(definition_of_frequencies), *arguments
    )
    assert max_error(value, true_value) <= 1e-5
    for actual, expected in zip(gradients, true_gradients, strict=True):
        assert max_error(actual, expected) <= 1e-5


@ALL
def test_parameters_shared_by_the_heads(name: str) -> None:
    q, k, *parameters = make_inputs(name, 4, 2, 16, 5)
    cos, sin = table(name, 16, jnp.arange(5)[None])
    of_one = [p[0] for p in parameters]
    of_each = [jnp.broadcast_to(p[0], p.shape) for p in parameters]
    cotangent = random(2, 4, 5, 5)
    value, gradients = fast(name)((q, k, *of_one), cotangent, cos, sin)
    same_value, each = fast(name)((q, k, *of_each), cotangent, cos, sin)
    chex.assert_trees_all_close(value, same_value, rtol=0, atol=1e-5)
    summed = [*each[:2], *(g.sum(0) for g in each[2:])]
    chex.assert_trees_all_close(list(gradients), summed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 9), (5, 3)])
def test_queries_and_keys_of_different_lengths(
    num_queries: int, num_keys: int, in_float64: Any, max_error: Any
) -> None:
    """As in decoding: the newest queries against the keys of a cache."""
    q, k, delta, bias = make_inputs("published", 2, 2, 8, 9)
    q, k = q[:, :num_queries], k[:, :num_keys]
    frequencies = rope_frequencies(8)
    q_positions = jnp.broadcast_to(9 + jnp.arange(num_queries), (2, num_queries))
    k_positions = jnp.broadcast_to(jnp.arange(num_keys), (2, num_keys))

    @jax.jit
    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        q = rotate(euler_adapt(q, delta, bias), *rotary_table(q_positions, frequencies))
        k = rotate(euler_adapt(k, delta), *rotary_table(k_positions, frequencies))
        return dot_scores(q, k)

    expected = in_float64(complex_scores, q, k, delta, bias, frequencies, q_positions, k_positions)
    assert max_error(scores(q, k), expected) <= 1e-5


def neutral(name: str, parameters: list[jax.Array]) -> list[jax.Array]:
    """delta = 1; a = 0; weights of the first harmonic only. No bias."""
    first, bias = (jnp.zeros_like(p) for p in parameters)
    if name == "published":
        first = first + 1
    if name == "harmonics":
        first = first.at[:, 1].set(1.0)
    return [first, bias]


@BOTH_DTYPES
@pytest.mark.parametrize("name", ["published", "smooth", "harmonics"])
def test_neutral_parameters_are_rope(name: str, dtype: Any) -> None:
    q, k, *parameters = make_inputs(name, 4, 2, 16, 6, dtype)
    cos, sin = table("rope", 16, jnp.arange(6)[None])
    rope = fast_scores("rope", q, k, (), cos, sin)
    actual = fast_scores(name, q, k, neutral(name, parameters), cos, sin)
    # Smooth: the same numbers. Harmonics: the same among zeros, summed in another order. Published:
    # there and back to polar coordinates; phases of up to pi, rounded to 2^-23, which may turn a
    # rounding to bfloat16 around.
    published = 2e-5 if dtype == jnp.float32 else 2.0**-6
    tolerance = {"smooth": 0.0, "harmonics": 2e-5, "published": published}[name]
    chex.assert_trees_all_close(actual, rope, rtol=0, atol=tolerance)


@ALL
def test_bfloat16_is_rounded_once(name: str) -> None:
    q, k, *parameters = make_inputs(name, 4, 2, 16, 6, jnp.bfloat16)
    encode = VARIANTS[name].encode
    cos, sin = table(name, 16, jnp.arange(100, 106)[None])
    wide = encode(q.astype(jnp.float32), k.astype(jnp.float32), cos, sin, *parameters)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    chex.assert_trees_all_equal(encode(q, k, cos, sin, *parameters), expected)


SMALL, SUBNORMAL = 2.0**-126, 1e-40
HARD = [
    *[(0.0, 0.0), (-0.0, 0.0), (0.0, -0.0), (-0.0, -0.0)],
    *[(SUBNORMAL, SUBNORMAL), (-SUBNORMAL, 0.0), (0.0, SUBNORMAL), (1e-45, -1e-45)],
    *[(SMALL, SUBNORMAL), (1.0, SUBNORMAL), (1e-19, -1e-19), (1e-5, 1e-12)],
    *[(-1.0, 0.0), (-1.0, -0.0), (-1.0, 1e-45), (-1.0, -1e-45), (0.0, 1.0), (-0.0, -1.0)],
]


@BOTH_DTYPES
@ALL
def test_gradients_at_zero_and_on_the_cut(name: str, dtype: Any) -> None:
    """Zeros of either sign, subnormal numbers, the branch cut: finite, and of bounded size."""
    points = jnp.asarray(HARD, jnp.float32).astype(dtype)
    x = points.reshape(1, len(HARD), 1, 2)
    _, _, *parameters = make_inputs(name, 1, 1, 2, 1)
    cos, sin = table(name, 2, jnp.arange(len(HARD))[None])

    @jax.jit
    def run(x: jax.Array, parameters: Any) -> Any:
        def encode(x: jax.Array, parameters: Any) -> Any:
            return VARIANTS[name].encode(x, x, cos, sin, *parameters)

        out, vjp = jax.vjp(encode, x, parameters)
        return out, vjp(jax.tree.map(jnp.ones_like, out))

    out, (by_x, by_parameters) = run(x, parameters)
    chex.assert_tree_all_finite((out, by_x, by_parameters))
    assert float(jnp.max(jnp.abs(by_x.astype(jnp.float32)))) < 50


@partial(jax.jit, static_argnums=0)
def scores_at(name: str, inputs: Any, positions: jax.Array) -> jax.Array:
    q, k, *parameters = inputs
    return fast_scores(name, q, k, parameters, *table(name, 8, positions))


def score_bound(name: str, inputs: Any) -> float:
    """What no score exceeds: the largest |q'| |k'|."""
    q, k, *parameters = inputs
    encoded = VARIANTS[name].encode(q, k, *table(name, 8, jnp.arange(5)[None]), *parameters)
    return float(np.prod([jnp.max(jnp.linalg.norm(x, axis=-1)) for x in encoded]))


@ALL
@PROPERTY
@given(
    starts=st.tuples(st.integers(0, 1000), st.integers(0, 1000)),
    steps=st.lists(st.integers(0, 50), min_size=4, max_size=4),
    shift=st.integers(0, 100_000),
)
def test_scores_depend_on_distances_only(
    name: str, starts: tuple[int, int], steps: list[int], shift: int
) -> None:
    inputs = make_inputs(name, 2, 1, 8, 5)
    positions = jnp.asarray(starts)[:, None] + np.cumsum([0, *steps])
    here, there = scores_at(name, inputs, positions), scores_at(name, inputs, positions + shift)
    # An angle is as large as the position and rounded to 2^-24 of it; queries and keys, here and
    # there, each have such an error.
    radians = 4 * 2.0**-24 * (int(positions.max()) + shift) + 1e-6
    atol = radians * score_bound(name, inputs)
    chex.assert_trees_all_close(here, there, rtol=0, atol=atol)


def turned(x: jax.Array, angle: jax.Array) -> jax.Array:
    return rotate(x, jnp.cos(angle)[None, None], jnp.sin(angle)[None, None])


@pytest.mark.parametrize("name", ["rope", "published", "harmonics"])
@PROPERTY
@given(angles=st.lists(st.floats(-1.5, 1.5, width=32), min_size=4, max_size=4))
def test_only_differences_of_phases_count(name: str, angles: list[float]) -> None:
    """Queries and keys turned together, plane by plane. Phases within +-pi/2, turned by as much,
    do not cross the cut; across it, the published form would not pass this."""
    q, k, *parameters = make_inputs(name, 2, 1, 8, 5)
    q, k = (jnp.concatenate([jnp.abs(x[..., :4]) + 0.1, x[..., 4:]], -1) for x in (q, k))
    angle = jnp.asarray(angles, jnp.float32)[None]
    positions = jnp.arange(5)[None]
    here = scores_at(name, (q, k, *parameters), positions)
    there = scores_at(name, (turned(q, angle), turned(k, angle), *parameters), positions)
    atol = 4e-6 * score_bound(name, (q, k, *parameters))
    chex.assert_trees_all_close(here, there, rtol=0, atol=atol)


@ALL
@PROPERTY
@given(order=st.permutations(range(6)))
def test_order_of_planes_does_not_matter(name: str, order: list[int]) -> None:
    """Planes move with their parameters and frequencies (PoPE: coordinates)."""
    q, k, *parameters = make_inputs(name, 4, 2, 12, 5)
    index = np.asarray(order)
    both_halves = np.concatenate([index, index + 6])
    frequencies = VARIANTS[name].frequencies(12)
    positions = jnp.arange(5)[None]

    def moved(x: jax.Array) -> jax.Array:
        return x[..., index if x.shape[-1] == 6 else both_halves]

    before = planes(name, q, k, parameters, frequencies, positions)
    after = planes(
        name, moved(q), moved(k), [moved(p) for p in parameters], moved(frequencies), positions
    )
    chex.assert_trees_all_close(after, before, rtol=0, atol=4e-5)


@partial(jax.jit, static_argnums=0)
def planes(
    name: str, q: Any, k: Any, parameters: Any, frequencies: Any, positions: Any
) -> jax.Array:
    return fast_scores(name, q, k, parameters, *rotary_table(positions, frequencies))


def jump_at_the_cut(name: str, *parameters: Any) -> tuple[float, float]:
    """|f(pi + h) - f(pi - h)| of an encoded unit query, and the angle 2h between its two phases."""
    half = 1e-3
    x = jnp.asarray([[np.cos(t), np.sin(t)] for t in (np.pi - half, np.pi + half)], jnp.float32)
    x = x.reshape(2, 1, 1, 2)
    cos, sin = table("rope", 2, jnp.zeros((1, 1)))
    before, after = VARIANTS[name].encode(x, x, cos, sin, *parameters)[0]
    return float(jnp.linalg.norm(after - before)), 2 * half


def test_published_form_jumps_at_the_cut() -> None:
    jump, _ = jump_at_the_cut("published", jnp.asarray([[0.5]]), jnp.zeros((1, 1)))
    # From e^{i pi / 2} to e^{-i pi / 2}.
    assert jump == pytest.approx(2.0, abs=1e-2)


def test_integer_delta_does_not_jump() -> None:
    jump, angle = jump_at_the_cut("published", jnp.asarray([[2.0]]), jnp.zeros((1, 1)))
    assert jump <= 2.01 * angle


@pytest.mark.parametrize("a", [(0.0, 0.0), (0.5, 0.0), (-1.0, 0.0), (-0.7, 0.9)])
def test_smooth_form_does_not_jump(a: tuple[float, float]) -> None:
    jump, angle = jump_at_the_cut("smooth", jnp.asarray([a]), jnp.ones((1, 1)))
    assert jump <= 1.01 * angle * (np.hypot(1, np.hypot(*a)) + np.hypot(*a)) ** 2


def test_harmonics_do_not_jump() -> None:
    weights = jnp.ones((1, 4, 1))
    jump, angle = jump_at_the_cut("harmonics", weights, jnp.ones((1, 4, 1)))
    # The r-th harmonic has slope r.
    assert jump <= 1.01 * angle * np.linalg.norm([0, 1, 2, 3])


def test_delta_zero_leaves_amplitudes_and_positions() -> None:
    """The other end of the dial: no semantic phase, only |q| |k| cos(b + (m - n) omega)."""
    q, k, delta, bias = make_inputs("published", 2, 2, 8, 5)
    cos, sin = table("published", 8, jnp.arange(5)[None])
    actual = fast_scores("published", q, k, (0 * delta, bias), cos, sin)
    q_radius, k_radius = (np.hypot(x[..., :4], x[..., 4:]) for x in (np.asarray(q), np.asarray(k)))
    distance = np.arange(5)[:, None] - np.arange(5)
    phase = np.asarray(bias)[:, None, None] + distance[..., None] * rope_frequencies(8)
    expected = np.einsum("bthp,bshp,htsp->bhts", q_radius, k_radius, np.cos(phase))
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-5)
    # The harmonic r = 0 is the same.
    weights = jnp.zeros((2, NUM_HARMONICS, 4)).at[:, 0].set(1.0)
    biases = jnp.zeros_like(weights).at[:, 0].set(bias)
    actual = fast_scores("harmonics", q, k, (weights, biases), cos, sin)
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-4)
