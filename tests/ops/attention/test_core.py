"""Masks and `attend` against a float64 softmax attention written out in full."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops.attention import attend, causal_mask, segment_mask

SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 3, 3, 0]])


def naive_attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True, where=mask, initial=-jnp.inf))
    weights = jnp.where(mask, weights, 0.0)
    weights = weights / jnp.sum(weights, -1, keepdims=True)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def make_inputs(
    num_heads: int, num_kv_heads: int, num_queries: int, num_keys: int, dtype: Any = jnp.float32
) -> tuple[jax.Array, ...]:
    normal = np.random.default_rng(0).standard_normal
    return (
        jnp.asarray(normal((2, num_queries, num_heads, 6)), dtype),
        jnp.asarray(normal((2, num_keys, num_kv_heads, 6)), dtype),
        jnp.asarray(normal((2, num_keys, num_kv_heads, 6)), dtype),
    )


def output_and_gradients(function: Any) -> Any:
    def run(qkv: Any, mask: Any) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: function(q, k, v, mask), *qkv)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return out, vjp(cotangent.astype(out.dtype))

    return run


def test_causal_mask() -> None:
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(causal_mask(3, 4), np.asarray([[expected]], bool))
    later = [[1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(causal_mask(2, 4, 2), np.asarray([[later]], bool))
    traced = jax.jit(lambda first: causal_mask(2, 4, first))(jnp.int32(2))
    np.testing.assert_array_equal(traced, causal_mask(2, 4, 2))


def test_segment_mask() -> None:
    mask = segment_mask(SEGMENTS, SEGMENTS[:, :4])
    assert mask.shape == (2, 1, 7, 4)
    for b, t, s in np.ndindex(2, 7, 4):
        assert mask[b, 0, t, s] == (SEGMENTS[b, t] == SEGMENTS[b, s])


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "mask"),
    [
        pytest.param(2, 2, causal_mask(7, 7), id="causal"),
        pytest.param(6, 2, causal_mask(7, 7) & segment_mask(SEGMENTS, SEGMENTS), id="packed"),
        pytest.param(4, 1, causal_mask(3, 7, 2), id="cached"),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attend(
    num_heads: int, num_kv_heads: int, mask: jax.Array, dtype: Any, in_float64: Any, max_error: Any
) -> None:
    qkv = make_inputs(num_heads, num_kv_heads, mask.shape[2], mask.shape[3], dtype)
    out, gradients = jax.jit(output_and_gradients(attend))(qkv, mask)
    truth, true_gradients = in_float64(output_and_gradients(naive_attend), qkv, mask)
    assert out.dtype == dtype
    # bfloat16: weights and outputs are rounded to it, 2^-8 each, the softmax is float32; the
    # gradients pass four such roundings.
    rounding = 1e-6 if dtype == jnp.float32 else 2.0**-8
    assert max_error(out, truth) <= 2 * rounding
    for actual, expected in zip(gradients, true_gradients, strict=True):
        assert max_error(actual, expected) <= 4 * rounding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_documents_never_see_a_neighbour(dtype: Any) -> None:
    """Bit for bit, and even for keys so large that they would win every softmax."""
    q, k, v = make_inputs(2, 1, 7, 7, dtype)
    mask = causal_mask(7, 7) & segment_mask(SEGMENTS, SEGMENTS)
    run = jax.jit(lambda q, k, v: attend(q, k, v, mask))
    before = run(q, k, v)
    first = (SEGMENTS == 1)[..., None, None]
    after = run(*(jnp.where(first, 1e4 * x, x) for x in (q, k, v)))
    others = np.asarray(SEGMENTS != 1)
    chex.assert_trees_all_equal(np.asarray(before)[others], np.asarray(after)[others])
    assert not np.array_equal(np.asarray(before)[~others], np.asarray(after)[~others])
