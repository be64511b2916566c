"""What runs on NVIDIA GPUs alone: VQCX_TEST_PLATFORM=cuda,cpu python -m pytest tests/gpu.

Elsewhere the same kernels are interpreted and compiled (tests/ops), and this is skipped.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax.ops import attention, dispatch
from vqcx_jax.ops.euler_turn import queries_and_keys

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU and VQCX_TEST_PLATFORM=cuda,cpu"
)


def normal(*shape: int, dtype: Any = jnp.bfloat16, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def values_and_gradients(function: Any, args: Any, seed: int = 9) -> Any:
    result, pull_back = jax.vjp(function, *args)
    cotangents = jax.tree.map(lambda x: normal(*x.shape, dtype=x.dtype, seed=seed), result)
    return result, pull_back(cotangents)


def assert_as_near(actual: Any, plain: Any, expected: Any, max_error: Any) -> None:
    """At most twice as far from the truth as plain JAX is."""
    leaves = (jax.tree.leaves(tree) for tree in (actual, plain, expected))
    for a, p, e in zip(*leaves, strict=True):
        assert max_error(a, e) <= 2 * max_error(p, e) + 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length, head_dim", [(1000, 64), (8192, 128), (333, 32), (100, 256)])
def test_turn(length: int, head_dim: int, dtype: Any, in_float64: Any, max_error: Any) -> None:
    q, k = (normal(1, length, heads, head_dim, dtype=dtype, seed=heads) for heads in (4, 2))
    positions = jnp.arange(length)[None]
    table = attention.rotary_table(positions, attention.rope_frequencies(head_dim))
    delta, bias = (normal(n, head_dim // 2, dtype=jnp.float32, seed=5 + n) for n in (2, 4))
    args = (q, k, *table, delta, bias)
    formula = functools.partial(values_and_gradients, attention.complex_queries_and_keys)
    kernel = functools.partial(queries_and_keys, implementation="mosaic_gpu")
    actual = jax.jit(functools.partial(values_and_gradients, kernel))(args)
    plain = jax.jit(formula)(args)
    with jax.default_device(jax.devices("cpu")[0]):
        expected = in_float64(formula, args)
    assert_as_near(actual, plain, expected, max_error)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("has_segments", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn(
    causal: bool, has_segments: bool, window: int | None, in_float64: Any, max_error: Any
) -> None:
    length, head_dim = 200, 64
    args = tuple(normal(2, length, heads, head_dim, seed=heads) for heads in (4, 2, 2))
    segment_ids = jnp.broadcast_to(jnp.arange(length) // 70, (2, length))

    def formula(*args: jax.Array) -> jax.Array:
        mask = jnp.ones((1, 1, length, length), bool)
        if causal:
            mask &= attention.causal_mask(length, length)
        if has_segments:
            mask = mask & attention.segment_mask(segment_ids, segment_ids)
        if window is not None:
            mask &= attention.window_mask(length, length, window)
        return attention.attend(*args, mask, scale=head_dim**-0.5)

    def cudnn(*args: jax.Array) -> jax.Array:
        segments = segment_ids if has_segments else None
        options = {"scale": head_dim**-0.5, "causal": causal, "window": window}
        return attention.attend_by_cudnn(*args, segments, **options)

    actual, plain = (
        jax.jit(functools.partial(values_and_gradients, function))(args)
        for function in (cudnn, formula)
    )
    with jax.default_device(jax.devices("cpu")[0]):
        expected = in_float64(functools.partial(values_and_gradients, formula), args)
    assert_as_near(actual, plain, expected, max_error)


def test_default_is_the_kernel() -> None:
    q = normal(1, 64, 2, 64)
    table = attention.rotary_table(jnp.arange(64)[None], attention.rope_frequencies(64))
    planes = jnp.ones((2, 32))
    with dispatch.record() as traced:
        queries_and_keys(q, q, *table, planes, planes)
    assert traced == [("euler_turn.queries_and_keys", "mosaic_gpu")]
