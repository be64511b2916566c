"""Rotary positions: float32 angles, and dot products that depend on distances only."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.ops.attention import (
    per_head_frequencies,
    rope_frequencies,
    rotary_table,
    rotate,
)


@pytest.mark.parametrize(("head_dim", "base"), [(4, 10_000.0), (6, 100.0), (256, 500_000.0)])
def test_frequencies(head_dim: int, base: float) -> None:
    expected = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    actual = rope_frequencies(head_dim, base)
    assert actual.dtype == jnp.float32
    # An exponent of up to ln(base) = 13 is rounded by 13 * 2^-24.
    chex.assert_trees_all_close(actual, np.asarray(expected, np.float32), rtol=2e-6)


@pytest.mark.parametrize(
    ("head_dim", "fraction", "num_turning"),
    [(64, 1.0, 32), (64, 0.75, 24), (6, 0.5, 1), (6, 0.67, 2), (8, 0.0, 0)],
)
def test_fraction_of_planes(head_dim: int, fraction: float, num_turning: int) -> None:
    """The highest frequencies stay what they are in RoPE; the others are 0."""
    actual = rope_frequencies(head_dim, fraction=fraction)
    np.testing.assert_array_equal(actual[:num_turning], rope_frequencies(head_dim)[:num_turning])
    np.testing.assert_array_equal(actual[num_turning:], 0.0)


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "base"), [(1, 8, 1e4), (3, 8, 1e4), (4, 6, 50.0)]
)
def test_heads_interleave(num_heads: int, head_dim: int, base: float) -> None:
    """Falling from head to head and then from plane to plane, they are those of one wide head."""
    actual = per_head_frequencies(num_heads, head_dim, base)
    chex.assert_shape(actual, (num_heads, head_dim // 2))
    one_wide_head = rope_frequencies(num_heads * head_dim, base)
    chex.assert_trees_all_close(actual.T.ravel(), one_wide_head, rtol=2e-6)
    part = per_head_frequencies(num_heads, head_dim, base, fraction=0.5)
    num_turning = head_dim // 4
    np.testing.assert_array_equal(part[:, :num_turning], actual[:, :num_turning])
    np.testing.assert_array_equal(part[:, num_turning:], 0.0)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"fraction=.*: must be in \[0, 1\]"):
        rope_frequencies(8, fraction=fraction)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_table(dtype: jnp.dtype) -> None:
    positions = jnp.asarray([[0, 1, 2], [5, 256, 257]], dtype)
    frequencies = rope_frequencies(8)
    cos, sin = rotary_table(positions, frequencies)
    chex.assert_shape((cos, sin), (2, 3, 4))
    chex.assert_type((cos, sin), jnp.float32)
    angles = np.asarray(positions, np.float64)[..., None] * np.asarray(frequencies, np.float64)
    # An angle of 257 radians is rounded by 2^-16.
    chex.assert_trees_all_close((cos, sin), (np.cos(angles), np.sin(angles)), rtol=0, atol=2e-5)


def test_rotation_of_each_plane() -> None:
    """Plane i is coordinates i and i + d/2, as one complex number."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 5, 6)), np.float64)
    angles = np.random.default_rng(0).uniform(-9, 9, (2, 3, 3))
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    arguments = [jnp.asarray(a, jnp.float32) for a in (x, np.cos(angles), np.sin(angles))]
    chex.assert_trees_all_close(jax.jit(rotate)(*arguments), expected, rtol=0, atol=2e-6)


def test_one_table_for_all_rows() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 6))
    cos, sin = rotary_table(jnp.arange(3), rope_frequencies(6))
    every_row = [jnp.broadcast_to(table, (2, 3, 3)) for table in (cos, sin)]
    chex.assert_trees_all_equal(rotate(x, cos, sin), rotate(x, *every_row))


def test_table_of_each_key_head() -> None:
    """Query heads 0 to 2 turn as key head 0, 3 to 5 as key head 1."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 8))
    positions = jnp.asarray([[0, 1, 2], [7, 8, 9]])
    frequencies = jnp.stack([rope_frequencies(8), rope_frequencies(8, 50.0)])
    table = rotary_table(positions, frequencies)
    chex.assert_shape(table, (2, 3, 2, 4))
    actual = rotate(x, *table)
    for head in range(6):
        shared = rotary_table(positions, frequencies[head // 3])
        expected = rotate(x[:, :, [head]], *shared)
        chex.assert_trees_all_equal(actual[:, :, [head]], expected)


def test_bfloat16_positions_stay_apart() -> None:
    """bfloat16 has no 257: with angles in it, positions 256 and 257 would be one."""
    assert jnp.bfloat16(257) == jnp.bfloat16(256)
    x = jnp.asarray([1.0, 0.0], jnp.bfloat16).reshape(1, 1, 1, 2)
    frequencies = jnp.ones((1,))
    at = [
        np.asarray(rotate(x, *rotary_table(jnp.asarray([[m]]), frequencies))[0, 0, 0], np.float64)
        for m in (256, 257)
    ]
    for turned, m in zip(at, (256, 257), strict=True):
        np.testing.assert_allclose(turned, [np.cos(m), np.sin(m)], atol=2.0**-8)
    # One radian further on: the chord 2 sin(1/2).
    assert np.linalg.norm(at[1] - at[0]) == pytest.approx(2 * np.sin(0.5), abs=0.02)


def test_bfloat16_is_rounded_once() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8)).astype(jnp.bfloat16)
    table = rotary_table(jnp.arange(1000, 1004)[None], rope_frequencies(8))
    wide = rotate(x.astype(jnp.float32), *table)
    chex.assert_trees_all_equal(rotate(x, *table), wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("length", [2**11, 2**13, 2**16])
def test_angles_far_from_the_beginning(length: int) -> None:
    """As one float32 product they would be off by 6e-5, 2e-4 and 2e-3."""
    error = 3e-7 + length * 2.0**-31
    frequencies = rope_frequencies(128)
    positions = np.random.default_rng(0).integers(length, size=2000)
    angles = np.float64(positions)[:, None] * np.float64(frequencies)
    cos, sin = jax.jit(rotary_table)(jnp.asarray(positions), frequencies)
    assert np.abs(cos - np.cos(angles)).max() <= error
    assert np.abs(sin - np.sin(angles)).max() <= error


def test_gradient_by_frequencies() -> None:
    positions, frequencies = jnp.asarray([5, 2047]), rope_frequencies(8)
    _, sin = rotary_table(positions, frequencies)
    by_frequency = jax.grad(lambda f: rotary_table(positions, f)[0].sum())(frequencies)
    expected = -(np.float64(positions)[:, None] * np.float64(sin)).sum(0)
    np.testing.assert_allclose(by_frequency, expected, rtol=1e-5)


def test_fraction_that_leaves_no_plane() -> None:
    with pytest.raises(UserError, match="fraction=0.02: no plane of 32 turns"):
        rope_frequencies(64, fraction=0.02)
    # 0.58 * 100 is a little less than 58.
    assert np.count_nonzero(rope_frequencies(100, fraction=0.58)) == 29
