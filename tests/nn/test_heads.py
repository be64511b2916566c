"""Every head offers the same functions, and they agree with its logits."""

import dataclasses
import inspect
from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

from vqcx_jax import sharding
from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError
from vqcx_jax.nn import FullHead, Head, VQHead, functional

ASSIGNMENT = jnp.asarray([0, 2, 2, 1, 0, 4, 4, 4, 1, 2, 0])  # Code 3 is empty.
KINDS = ("vq", "full")


CAP = 1.5  # Products reach 4 and more.


def make_head(kind: str, token_bias: bool, dtype: Any = jnp.float32, **options: Any) -> Head:
    options |= {"token_bias": token_bias, "dtype": dtype, "rngs": nnx.Rngs(0)}
    if kind == "vq":
        head: Any = VQHead(ASSIGNMENT, 5, 8, **options)
        head.codes[...] = jnp.asarray(np.random.default_rng(0).standard_normal((5, 8)), jnp.float32)
    else:
        head = FullHead(11, 8, **options)
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
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("kind", KINDS)
def test_nll_is_log_softmax_of_logits(
    kind: str, cap: float | None, token_bias: bool, dtype: Any, h: jax.Array, targets: jax.Array
) -> None:
    head = make_head(kind, token_bias, dtype, logit_soft_cap=cap)

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


@pytest.mark.parametrize("kind", KINDS)
def test_soft_cap_is_on_the_product_and_not_on_the_bias(kind: str, h: jax.Array) -> None:
    products = np.float64(make_head(kind, token_bias=False).logits(h))
    assert np.abs(products).max() > 2 * CAP
    head: Any = make_head(kind, token_bias=True, logit_soft_cap=CAP)
    expected = CAP * np.tanh(products / CAP) + np.asarray(head.bias)
    chex.assert_trees_all_close(head.logits(h), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("token_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_is_that_of_the_logits(
    kind: str, token_bias: bool, cap: float | None, dtype: Any, h: jax.Array
) -> None:
    """Without a bias, tokens of a code are ties."""
    head = make_head(kind, token_bias, dtype, logit_soft_cap=cap)

    @jax.jit
    def outputs(head: Head, h: jax.Array) -> Any:
        return head.top_k(h, 6), head.logits(h)

    (log_probs, tokens), logits = outputs(head, h.astype(dtype))
    chex.assert_type((log_probs, tokens), (jnp.float32, jnp.int32))
    np.testing.assert_array_equal(tokens, jax.lax.top_k(logits, 6)[1])
    log_p = scipy.special.log_softmax(np.float64(logits), axis=-1)
    expected = np.take_along_axis(log_p, np.asarray(tokens), axis=-1)
    chex.assert_trees_all_close(log_probs, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [0, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_out_of_range(kind: str, k: int, h: jax.Array) -> None:
    with pytest.raises(UserError, match=f"top_k={k}: must be in 1 .. 11"):
        make_head(kind, token_bias=True).top_k(h, k)


@cache
def sampled_head(kind: str) -> Head:
    return make_head(kind, token_bias=True, logit_soft_cap=CAP)


def expected_probabilities(
    logits: jax.Array, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """The three options as a user reads them, one after the other; no ties."""
    p = scipy.special.softmax(np.float64(logits) / temperature)
    order = np.argsort(-p)
    p[order[len(p) if top_k is None else top_k :]] = 0
    p /= p.sum()
    mass_before = np.cumsum(p[order]) - p[order]
    p[order[mass_before >= (top_p or 1.0)]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (0.5, None, None),
        (1.0, None, None),
        (2.0, None, None),
        (1.0, 4, None),
        (2.0, 4, None),
        (1.0, None, 0.7),
        (2.0, None, 0.7),
        (1.0, 5, 0.7),
        (0.5, 5, 0.9),
        (1.0, 100, 1.0),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_samples(
    kind: str, temperature: float, top_k: int | None, top_p: float | None, h: jax.Array
) -> None:
    head = sampled_head(kind)
    row = h[:1, :1]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    @jax.jit
    def draw(head: Head, h: jax.Array, key: jax.Array) -> jax.Array:
        return head.sample(h, key, **options)

    tokens = draw(head, jnp.broadcast_to(row, (20, 500, 8)), jax.random.key(0))
    chex.assert_shape(tokens, (20, 500))
    chex.assert_type(tokens, jnp.int32)
    counts = np.bincount(tokens.ravel(), minlength=11)
    p = expected_probabilities(head.logits(row)[0, 0], **options)
    assert not counts[p == 0].any()
    # A right sampler fails once in 10^4.
    assert scipy.stats.chisquare(counts[p > 0], 10_000 * p[p > 0]).pvalue > 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_temperature_0_is_the_argmax_of_the_logits(
    kind: str, options: dict[str, Any], h: jax.Array
) -> None:
    for token_bias in (True, False):
        head = make_head(kind, token_bias)
        tokens = head.sample(h, jax.random.key(0), temperature=0.0, **options)
        np.testing.assert_array_equal(tokens, jnp.argmax(head.logits(h), axis=-1))


@pytest.mark.parametrize("kind", KINDS)
def test_sampler_is_sample(kind: str, h: jax.Array) -> None:
    head = sampled_head(kind)
    sampler = head.sampler(temperature=1.5, top_k=7)
    first, second = (sampler(h, jax.random.key(seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    again = head.sample(h, jax.random.key(1), temperature=1.5, top_k=7)
    np.testing.assert_array_equal(second, again)


@jax.jit
def top_4(head: Head, h: jax.Array) -> Any:
    return head.top_k(h, 4)


@jax.jit
def samples(head: Head, h: jax.Array) -> Any:
    options: tuple[Any, ...] = ({}, {"top_p": 0.9}, {"top_k": 5, "top_p": 0.9})
    return [head.sample(h, jax.random.key(0), **o) for o in options]


@pytest.mark.parametrize("axis_type", ["explicit", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_and_samples_on_a_mesh(kind: str, axis_type: str) -> None:
    """Top-k of a batch that is sharded as in training; samples of one that is whole."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, axis_type)
    h = jax.random.normal(jax.random.key(1), (4, 2, 8))
    for function, rules in (
        (top_4, ShardingRules()),
        (samples, dataclasses.replace(ShardingRules(), batch=())),
    ):
        if kind == "vq":
            head: Any = VQHead(jnp.arange(12) % 5, 5, 8, rules=rules, rngs=nnx.Rngs(0))
        else:
            head = FullHead(12, 8, rules=rules, rngs=nnx.Rngs(0))
        expected = function(head, h)
        graphdef, *arrays = functional.split(head)
        with jax.set_mesh(mesh):
            arrays = jax.device_put(tuple(arrays), functional.shardings(head, mesh, rules))
            batch = sharding.named_sharding(mesh, ("batch", None, None), rules)
            actual = function(nnx.merge(graphdef, *arrays), jax.device_put(h, batch))
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_heads_satisfy_the_protocol() -> None:
    for kind in (VQHead, FullHead):
        for name in ("nll", "logits", "top_k", "sample", "sampler"):
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
