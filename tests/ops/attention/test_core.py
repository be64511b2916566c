"""Masks and `attend` against a float64 softmax attention written out in full."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops.attention import (
    attend,
    causal_mask,
    segment_mask,
    window_mask,
)

# As users compile it.
pytestmark = [oldest_jax, pytest.mark.usefixtures("fully_optimized")]

SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 3, 3, 0]])
WINDOW = causal_mask(7, 7) & window_mask(7, 7, 3)
PACKED = causal_mask(7, 7) & segment_mask(SEGMENTS, SEGMENTS)


def naive_attend(
    q: Any, k: Any, v: Any, mask: Any, *, bias: Any = 0.0, scale: Any = None, soft_cap: Any = None
) -> Any:
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores + bias
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True, where=mask, initial=-jnp.inf))
    weights = jnp.where(mask, weights, 0.0)
    weights = weights / jnp.sum(weights, -1, keepdims=True)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def make_inputs(
    num_heads: int,
    num_kv_heads: int,
    num_queries: int,
    num_keys: int,
    dtype: Any = jnp.float32,
    qk_dim: int = 6,
) -> tuple[jax.Array, ...]:
    normal = np.random.default_rng(0).standard_normal
    return (
        jnp.asarray(normal((2, num_queries, num_heads, qk_dim)), dtype),
        jnp.asarray(normal((2, num_keys, num_kv_heads, qk_dim)), dtype),
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


def test_window_mask() -> None:
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    np.testing.assert_array_equal(window_mask(3, 4, 2), np.asarray([[expected]], bool))
    later = [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    traced = jax.jit(lambda first: window_mask(2, 5, 2, first))(jnp.int32(3))
    np.testing.assert_array_equal(traced, np.asarray([[later]], bool))
    last_two = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    both = window_mask(3, 3, 2) & causal_mask(3, 3)
    np.testing.assert_array_equal(both, np.asarray([[last_two]], bool))
    np.testing.assert_array_equal(window_mask(3, 3, 1)[0, 0], np.eye(3, dtype=bool))
    with pytest.raises(UserError, match="window=0: must be at least 1"):
        window_mask(3, 4, 0)


def test_segment_mask() -> None:
    mask = segment_mask(SEGMENTS, SEGMENTS[:, :4])
    assert mask.shape == (2, 1, 7, 4)
    for b, t, s in np.ndindex(2, 7, 4):
        assert mask[b, 0, t, s] == (SEGMENTS[b, t] == SEGMENTS[b, s])


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "mask"),
    [
        pytest.param(2, 2, causal_mask(7, 7), id="causal"),
        pytest.param(6, 2, PACKED, id="packed"),
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


RANDOM = np.random.default_rng(5).standard_normal((2, 4, 7, 7), np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("qk_dim", "bias", "options"),
    [
        pytest.param(6, RANDOM, {"scale": 0.3}, id="bias"),
        pytest.param(6, RANDOM[:1, :, :1], {"scale": 6**-0.5, "soft_cap": 0.7}, id="soft_cap"),
        pytest.param(18, RANDOM[0, 0, 0], {"scale": 0.3}, id="wide"),
        pytest.param(18, RANDOM, {"scale": 0.3, "soft_cap": 0.7}, id="wide_soft_cap"),
    ],
)
def test_options(
    qk_dim: int,
    bias: np.ndarray,
    options: dict[str, float],
    dtype: Any,
    in_float64: Any,
    max_error: Any,
) -> None:
    """In both implementations, as the width of queries and keys and the soft-cap decide."""
    inputs = *make_inputs(4, 2, 7, 7, dtype, qk_dim), jnp.asarray(bias)

    def run(function: Any, *arguments: Any) -> Any:
        def of_arrays(q: Any, k: Any, v: Any, bias: Any) -> Any:
            return function(q, k, v, PACKED, bias=bias, **options)

        out, vjp = jax.vjp(of_arrays, *arguments)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return out, vjp(cotangent.astype(out.dtype))

    out, gradients = jax.jit(run, static_argnums=0)(attend, *inputs)
    truth, true_gradients = in_float64(partial(run, naive_attend), *inputs)
    assert out.dtype == dtype
    rounding = 1e-6 if dtype == jnp.float32 else 2.0**-8
    assert max_error(out, truth) <= 2 * rounding
    for actual, expected in zip(gradients, true_gradients, strict=True):
        assert max_error(actual, expected) <= 6 * rounding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_implementations_agree(dtype: Any) -> None:
    """A soft-cap far above all scores takes the path of our own."""
    qkv = make_inputs(6, 2, 7, 7, dtype)
    ours = jax.jit(output_and_gradients(lambda *x: attend(*x, soft_cap=1e4)))(qkv, PACKED)
    jax_nn = jax.jit(output_and_gradients(attend))(qkv, PACKED)
    tolerance = 3e-6 if dtype == jnp.float32 else 2.0**-6
    chex.assert_trees_all_close(ours, jax_nn, rtol=tolerance, atol=tolerance)


def test_wide_queries_are_padded_ones() -> None:
    """Zeros appended to queries and keys change nothing, but for the scale to be given."""
    q, k, v = make_inputs(4, 2, 7, 7)
    wide_q, wide_k = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 5))) for x in (q, k))
    actual = attend(wide_q, wide_k, v, WINDOW, scale=6**-0.5)
    chex.assert_trees_all_close(actual, attend(q, k, v, WINDOW), rtol=0, atol=2e-6)
    with pytest.raises(UserError, match="scale=None: must be given for queries of width 11"):
        attend(wide_q, wide_k, v, WINDOW)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_no_mask_shows_everything(soft_cap: float | None) -> None:
    q, k, v = make_inputs(2, 2, 3, 5)
    everything = jnp.ones((1, 1, 3, 5), bool)
    expected = attend(q, k, v, everything, soft_cap=soft_cap)
    chex.assert_trees_all_close(attend(q, k, v, None, soft_cap=soft_cap), expected, rtol=1e-6)


@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_without_a_visible_key(dtype: Any, soft_cap: float | None) -> None:
    """Zeros, forwards and backwards; other rows are as they were."""
    qkv = make_inputs(4, 2, 7, 7, dtype)
    empty = jnp.zeros(7, bool).at[jnp.asarray([2, 5])].set(True)
    mask = PACKED & ~empty[:, None]

    def run(mask: jax.Array, **options: Any) -> Any:
        return output_and_gradients(lambda *x: attend(*x, soft_cap=soft_cap, **options))(qkv, mask)

    out, (by_q, by_k, by_v) = run(mask, empty_rows=True)
    chex.assert_tree_all_finite((out, by_q, by_k, by_v))
    np.testing.assert_array_equal(out[:, empty], 0)
    np.testing.assert_array_equal(by_q[:, empty], 0)
    expected, gradients = run(PACKED)
    chex.assert_trees_all_equal(out[:, ~empty], expected[:, ~empty])
    chex.assert_trees_all_equal(by_q[:, ~empty], gradients[0][:, ~empty])
    # A key that no query sees.
    mask = mask & (jnp.arange(7) != 5)
    _, (_, by_k, by_v) = run(mask, empty_rows=True)
    np.testing.assert_array_equal(by_k[:, 5], 0)
    np.testing.assert_array_equal(by_v[:, 5], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_packed_documents_never_see_a_neighbour(dtype: Any) -> None:
    """Bit for bit, and even for keys so large that they would win every softmax."""
    q, k, v = make_inputs(2, 1, 7, 7, dtype)
    run = jax.jit(lambda q, k, v: attend(q, k, v, PACKED))
    before = run(q, k, v)
    first = (SEGMENTS == 1)[..., None, None]
    after = run(*(jnp.where(first, 1e4 * x, x) for x in (q, k, v)))
    others = np.asarray(SEGMENTS != 1)
    chex.assert_trees_all_equal(np.asarray(before)[others], np.asarray(after)[others])
    assert not np.array_equal(np.asarray(before)[~others], np.asarray(after)[~others])
