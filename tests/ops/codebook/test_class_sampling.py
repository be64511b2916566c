"""The best tokens of classes, and drawn ones, against the distribution over all tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from class_cases import CLASSES, D, V, class_of, make
from drawn import assert_drawn_from
from versions import oldest_jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import sampling
from vqcx_jax.ops.codebook import class_nucleus, class_order, class_sampling, classes

pytestmark = oldest_jax

FREQUENT = np.asarray(CLASSES.entries[: classes.num_frequent(CLASSES)])


def make_sharp(sharpness: float) -> tuple[jax.Array, Any]:
    """Hidden states and weights. Distributions from almost flat ones to sharp ones."""
    h, weights, _ = make(jnp.float32)
    return sharpness * h, weights._replace(bias=sharpness * weights.bias)


def best(h: Any, weights: Any, k: int) -> Any:
    vectors = classes.entry_vectors(weights, CLASSES)
    return class_sampling.top_k(h, vectors, weights, CLASSES, k)


@pytest.mark.parametrize(("sharpness", "at_a_time"), [(0.01, 1), (1.0, 60), (10.0, 10_000)])
def test_best_tokens(sharpness: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of distributions that are almost flat, which need all classes, and of sharp ones."""
    monkeypatch.setattr(class_order, "_TOKENS", at_a_time)
    h, weights, _ = make(jnp.float32)
    weights = weights._replace(bias=sharpness * weights.bias)
    log_p = classes.log_probs(sharpness * h, weights, CLASSES)
    for k in (1, 30, V):
        found, tokens = jax.jit(best, static_argnames="k")(sharpness * h, weights, k=k)
        np.testing.assert_allclose(found, jax.lax.top_k(log_p, k)[0], rtol=1e-5, atol=1e-5)
        of_tokens = jnp.take_along_axis(log_p, tokens, axis=-1)
        np.testing.assert_allclose(found, of_tokens, rtol=1e-5, atol=1e-5)
        assert np.all(np.diff(np.sort(tokens)) > 0)
        assert tokens.dtype == jnp.int32


def test_equal_tokens_in_order() -> None:
    """As in a model that has not been trained: tokens of classes of one size are all alike."""
    of_token = np.arange(20, dtype=np.int32) % 5
    codes = jnp.zeros((25, 1), jnp.int32)
    tokens = classes.arrange(of_token, 5)
    codes = classes.arrange_codes(codes, tokens, 1)
    weights = classes.Weights(jnp.zeros((1, 1, 4)), codes, None, None)
    vectors = classes.entry_vectors(weights, tokens)
    for k in (1, 7, 20):
        _, found = class_sampling.top_k(jnp.ones((3, 4)), vectors, weights, tokens, k)
        np.testing.assert_array_equal(found, np.broadcast_to(np.arange(k), (3, k)))


def test_only_classes_that_may_have_one_of_the_best_are_looked_at() -> None:
    """A loop that looked at all of them would list NaN."""
    h, weights, _ = make(jnp.float32)
    bias = weights.bias.at[FREQUENT[:2]].set(1e3).at[np.flatnonzero(class_of() >= 0)].set(jnp.nan)
    _, tokens = best(h, weights._replace(bias=bias), 2)
    np.testing.assert_array_equal(np.sort(tokens), np.broadcast_to(FREQUENT[:2], tokens.shape))


def test_how_many_best_tokens_there_are() -> None:
    h, weights, _ = make(jnp.float32)
    for k in (0, V + 1):
        with pytest.raises(UserError, match=f"top_k={k}: must be in 1 .. {V}"):
            best(h, weights, k)


def draws(count: int, h_D: jax.Array, weights: Any, **options: Any) -> np.ndarray:
    """Of so many tokens of one hidden state, how many are each token."""

    @jax.jit
    def draw(h_D: jax.Array, weights: Any) -> Any:
        rows, vectors = jnp.broadcast_to(h_D, (count, D)), classes.entry_vectors(weights, CLASSES)
        return class_sampling.sample(rows, vectors, weights, CLASSES, jax.random.key(0), **options)

    tokens = draw(h_D, weights)
    assert tokens.dtype == jnp.int32 and tokens.shape == (count,)
    assert np.all((tokens >= 0) & (tokens < V))
    return np.bincount(tokens, minlength=V)


@pytest.mark.parametrize(
    ("sharpness", "temperature", "num_draws"),
    [(0.01, 0.3, 1), (0.01, 4.0, 32), (3.0, 0.3, 32), (3.0, 1.0, 1), (3.0, 1.0, 32), (3.0, 4.0, 1)],
)
def test_draws(
    sharpness: float, temperature: float, num_draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one draw has to do, and many tokens come from V log-probabilities."""
    monkeypatch.setattr(class_sampling, "_NUM_DRAWS", num_draws)
    h, weights = make_sharp(sharpness)
    counts = draws(20_000, h[0, 0], weights, temperature=temperature)
    log_p = np.float64(classes.log_probs(h[0, 0], weights, CLASSES))
    assert_drawn_from(counts, scipy.special.softmax(log_p / temperature))


@pytest.mark.parametrize(
    ("temperature", "top_p", "num_draws"),
    [(0.5, 0.05, 1), (0.5, 0.6, 32), (2.0, 0.05, 32), (2.0, 0.6, 1), (2.0, 1.0, 32)],
)
def test_draws_from_the_nucleus(
    temperature: float, top_p: float, num_draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_sampling, "_NUM_DRAWS", num_draws)
    h, weights = make_sharp(1.0)
    counts = draws(20_000, h[0, 0], weights, temperature=temperature, top_p=top_p)
    log_p = classes.log_probs(h[0, 0], weights, CLASSES)
    left = sampling.nucleus(log_p / temperature, top_p)
    assert_drawn_from(counts, scipy.special.softmax(np.float64(left)))


@pytest.mark.parametrize(
    ("sharpness", "at_a_time"), [(0.01, 1), (0.01, 60), (1.0, 60), (3.0, 1), (3.0, 10_000)]
)
def test_nucleus_is_that_of_all_tokens(
    sharpness: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token, of every position but the first, which is not asked for."""
    monkeypatch.setattr(class_order, "_TOKENS", at_a_time)
    h, weights = make_sharp(sharpness)
    h_NxD = h.reshape(-1, D)
    log_p_NxV = classes.log_probs(h_NxD, weights, CLASSES)

    @jax.jit
    def inside(power: jax.Array, top_p: jax.Array) -> Any:
        vectors = classes.entry_vectors(weights, CLASSES)
        level = class_order.first_level(h_NxD, vectors, weights, CLASSES)

        def of_token(token: jax.Array) -> jax.Array:
            tokens_N = jnp.full(len(h_NxD), token)
            log_p_N = log_p_NxV[:, token]
            asked_N = jnp.arange(len(h_NxD)) > 0
            return class_nucleus.in_nucleus(
                level, weights, CLASSES, tokens_N, log_p_N, asked_N, power, top_p
            )

        return jax.lax.map(of_token, jnp.arange(V)).T

    for power in (0.5, 1.0, 3.0):
        for top_p in (0.001, 0.3, 0.9, 1.0):
            expected = sampling.nucleus(power * log_p_NxV, top_p) > -jnp.inf
            found = inside(power, top_p)
            np.testing.assert_array_equal(found[1:], expected[1:])
            assert not np.any(found[0])


def test_only_classes_that_matter_for_a_draw_are_looked_at() -> None:
    """Others are NaN. The two frequent tokens weigh more than all, at any temperature below 1."""
    h, weights, _ = make(jnp.float32)
    bias = weights.bias.at[FREQUENT[:2]].set(1e3).at[np.flatnonzero(class_of() >= 0)].set(jnp.nan)
    for options in ({}, {"temperature": 0.5}, {"top_p": 0.9}, {"temperature": 0.5, "top_p": 0.9}):
        counts = draws(1000, h[0, 0], weights._replace(bias=bias), **options)
        assert counts[FREQUENT[:2]].sum() == 1000


@pytest.mark.parametrize("temperature", [0.0, 1e-38])
def test_low_temperatures_are_greedy(temperature: float) -> None:
    h, weights = make_sharp(1.0)
    best = int(np.argmax(classes.log_probs(h[0, 0], weights, CLASSES)))
    for top_p in (None, 0.9):
        assert draws(1000, h[0, 0], weights, temperature=temperature, top_p=top_p)[best] == 1000


def test_high_temperatures_are_uniform() -> None:
    h, weights = make_sharp(1.0)
    assert_drawn_from(draws(20_000, h[0, 0], weights, temperature=1e38), np.full(V, 1 / V))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 0.5}, {"top_p": 0.9}])
def test_draws_from_nan_are_tokens(options: dict[str, float]) -> None:
    h, weights = make_sharp(1.0)
    draws(10, h[0, 0] * jnp.nan, weights, **options)


def test_best_tokens_of_nan() -> None:
    h, weights = make_sharp(1.0)
    log_p, tokens = best(h.at[0, 0].set(jnp.nan), weights, 3)
    assert np.all(np.isnan(log_p[0, 0])) and np.all(np.isfinite(log_p[0, 1:]))
    np.testing.assert_array_equal(tokens[0, 0], [0, 1, 2])


def test_no_positions() -> None:
    h, weights = make_sharp(1.0)
    log_p, tokens = best(h[:0], weights, 3)
    assert log_p.shape == tokens.shape == (0, 23, 3)
    draws(0, h[0, 0], weights, temperature=0.5, top_p=0.9)


def test_options_out_of_range() -> None:
    h, weights = make_sharp(1.0)
    with pytest.raises(UserError, match="temperature=-1.0: must be at least 0"):
        draws(1, h[0, 0], weights, temperature=-1.0)
    with pytest.raises(UserError, match="top_p=0.0: must be above 0 and at most 1"):
        draws(1, h[0, 0], weights, top_p=0.0)
