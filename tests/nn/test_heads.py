"""Every head offers the same two functions, and they agree."""

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from vqcx_jax.nn import FullHead, Head, VQHead

ASSIGNMENT = jnp.asarray([0, 2, 2, 1, 0, 4, 4, 4, 1, 2, 0])  # Code 3 is empty.
KINDS = ("vq", "full")


def make_head(kind: str, token_bias: bool, dtype: Any = jnp.float32) -> Head:
    rngs = nnx.Rngs(0)
    if kind == "vq":
        head: Any = VQHead(ASSIGNMENT, 5, 8, token_bias=token_bias, dtype=dtype, rngs=rngs)
        head.codes[...] = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)), jnp.float32)
    else:
        head = FullHead(11, 8, token_bias=token_bias, dtype=dtype, rngs=rngs)
        head.weights[...] *= 50.0
    if token_bias:
        head.bias[...] = jnp.asarray(np.random.default_rng(1).standard_normal(11), jnp.float32)
    return head


@pytest.fixture(scope="module")
def h() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, 5, 8))


@pytest.fixture(scope="module")
def targets() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).integers(11, size=(2, 5)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("token_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nll_is_log_softmax_of_logits(
    kind: str, token_bias: bool, dtype: Any, h: jax.Array, targets: jax.Array
) -> None:
    head = make_head(kind, token_bias, dtype)

    @jax.jit
    def outputs(head: Head, h: jax.Array) -> tuple[jax.Array, ...]:
        return *head.nll(h, targets), head.logits(h)

    nll, log_z, logits = outputs(head, h.astype(dtype))
    chex.assert_shape((nll, log_z, logits), [(2, 5), (2, 5), (2, 5, 11)])
    chex.assert_type((nll, log_z, logits), jnp.float32)
    logits = np.asarray(logits, np.float64)
    log_p = scipy.special.log_softmax(logits, axis=-1)
    expected = -np.take_along_axis(log_p, np.asarray(targets)[..., None], axis=-1)[..., 0]
    # Both are float32 from the products on, in either dtype. nll is a difference of two numbers up
    # to 16, rounded to 5e-7 each.
    chex.assert_trees_all_close(nll, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(log_z, scipy.special.logsumexp(logits, -1), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_formula(kind: str, h: jax.Array) -> None:
    head: Any = make_head(kind, token_bias=True)
    rows = head.codes[...][ASSIGNMENT] if kind == "vq" else head.weights[...]
    expected = np.asarray(h, np.float64) @ np.asarray(rows, np.float64).T + np.asarray(head.bias)
    chex.assert_trees_all_close(head.logits(h), expected, rtol=0, atol=1e-5)


def test_heads_satisfy_the_protocol() -> None:
    for kind in (VQHead, FullHead):
        for name in ("nll", "logits"):
            signature = inspect.signature(getattr(kind, name))
            assert signature == inspect.signature(getattr(Head, name))


def test_initial_values() -> None:
    vq = VQHead(jnp.arange(200) % 100, 100, 64, rngs=nnx.Rngs(0))
    full = FullHead(100, 64, token_bias=True, rngs=nnx.Rngs(0))
    for rows, head in ((vq.codes, vq), (full.weights, full)):
        assert rows.shape == (100, 64)
        # 6400 samples: their deviation is known to 1/sqrt(2 * 6400) = 1%, four of which are 4%.
        assert np.std(rows[...]) == pytest.approx(0.02, rel=0.04)
        assert not np.any(head.bias[...])
    assert vq.bias.shape == (200,)
    assert not hasattr(VQHead(jnp.arange(5), 5, 4, token_bias=False, rngs=nnx.Rngs(0)), "bias")


def test_codes_to_start_from() -> None:
    codes = jnp.arange(40.0).reshape(5, 8)
    head = VQHead(ASSIGNMENT, 5, 8, codes=codes, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(head.codes[...], codes)
