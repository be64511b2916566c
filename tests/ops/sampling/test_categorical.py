"""Which ids may be drawn, how often, and in which order the three options apply."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from vqcx_jax.errors import UserError
from vqcx_jax.ops import sampling

DRAWS = 20_000
# Probabilities 0.4, 0.3, 0.15, 0.1, 0.05, not in order.
PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = jnp.asarray(np.log(PROBABILITIES) + 3.0, jnp.float32)


# One compilation for all temperatures and all top_p.
sample = jax.jit(sampling.sample, static_argnames="top_k")


def frequencies(logits: jax.Array, **options: Any) -> np.ndarray:
    rows = jnp.broadcast_to(logits, (DRAWS, *logits.shape))
    ids = sample(rows, jax.random.key(0), **options)
    chex.assert_shape(ids, (DRAWS,))
    chex.assert_type(ids, jnp.int32)
    return np.bincount(ids, minlength=logits.size)


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """The support exactly; the frequencies by a test that a right sampler fails once in 10^4."""
    support = probabilities > 0
    assert not counts[~support].any()
    expected = counts.sum() * probabilities[support] / probabilities[support].sum()
    if len(expected) > 1:
        assert scipy.stats.chisquare(counts[support], expected).pvalue > 1e-4


def only(*ids: int) -> np.ndarray:
    return np.where(np.isin(np.arange(5), ids), PROBABILITIES, 0.0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    counts = frequencies(LOGITS, temperature=temperature)
    assert_drawn_from(counts, scipy.special.softmax(np.log(PROBABILITIES) / temperature))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": 1}, only(1)),
        ({"top_k": 3}, only(1, 3, 4)),
        ({"top_k": 5}, PROBABILITIES),
        ({"top_k": 1000}, PROBABILITIES),
        ({"top_p": 1e-6}, only(1)),
        ({"top_p": 0.39}, only(1)),
        ({"top_p": 0.41}, only(1, 3)),
        ({"top_p": 0.84}, only(1, 3, 4)),
        ({"top_p": 1.0}, PROBABILITIES),
        # Of the top 2, the first has 0.57: top-p sees what top-k has left.
        ({"top_k": 2, "top_p": 0.5}, only(1)),
        ({"top_k": 2, "top_p": 0.6}, only(1, 3)),
        # Squared and normalised, the first has 0.56: top-p sees what the temperature has made.
        ({"temperature": 0.5, "top_p": 0.5}, only(1) ** 2),
        ({"temperature": 0.5, "top_p": 0.6}, only(1, 3) ** 2),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9}, only(1, 3) ** 2),
    ],
)
def test_options(options: dict[str, Any], expected: np.ndarray) -> None:
    assert_drawn_from(frequencies(LOGITS, **options), expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}])
def test_temperature_0_takes_the_lowest_of_equal_ids(options: dict[str, Any]) -> None:
    logits = jnp.asarray([0.0, 3.0, 3.0, 1.0])
    for seed in range(3):
        key = jax.random.key(seed)
        assert sample(logits, key, temperature=0.0, **options) == 1


def test_a_tiny_temperature_is_greedy() -> None:
    assert_drawn_from(frequencies(LOGITS, temperature=1e-38), only(1))


def test_same_key_same_ids() -> None:
    def draw(seed: int) -> list[int]:
        rows = jnp.broadcast_to(LOGITS, (4, 25, 5))
        return sample(rows, jax.random.key(seed), top_k=4).ravel().tolist()

    assert draw(0) == draw(0) != draw(1)


def test_top_k_log_probabilities() -> None:
    logits = jnp.asarray(np.random.default_rng(0).integers(-3, 3, (4, 6, 50)), jnp.float32)
    log_probs, ids = jax.jit(sampling.top_k, static_argnums=1)(logits, 7)
    # A stable sort of the negated logits: of equals, the lowest id first.
    order = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[..., :7]
    np.testing.assert_array_equal(ids, order)
    expected = np.take_along_axis(scipy.special.log_softmax(np.float64(logits), -1), order, -1)
    chex.assert_trees_all_close(log_probs, expected, rtol=1e-6)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_top_k_out_of_range(k: int) -> None:
    with pytest.raises(UserError, match=f"top_k={k}: must be in 1 .. 5"):
        sampling.top_k(LOGITS, k)


def test_sampling_of_no_token() -> None:
    with pytest.raises(UserError, match="top_k=0: must be"):
        sampling.sample(LOGITS, jax.random.key(0), top_k=0)


@pytest.mark.parametrize("top_p", [0.0, -1.0, 1.5, float("nan")])
def test_mass_out_of_range(top_p: float) -> None:
    with pytest.raises(UserError, match=f"top_p={top_p}: must be above 0 and at most 1"):
        sampling.sample(LOGITS, jax.random.key(0), top_p=top_p)
    for kind in (np.float32, jnp.float32):
        with pytest.raises(UserError, match="top_p=.*: must be above 0 and at most 1"):
            sampling.sample(LOGITS, jax.random.key(0), top_p=kind(top_p))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(UserError, match=f"temperature={temperature}: must be at least 0, and fin"):
        sampling.sample(LOGITS, jax.random.key(0), temperature=temperature)
    for kind in (np.float32, jnp.float32):
        with pytest.raises(UserError, match="temperature=.*: must be at least 0, and finite"):
            sampling.sample(LOGITS, jax.random.key(0), temperature=kind(temperature))


def test_nucleus_keeps_all_that_are_as_probable_as_the_last() -> None:
    logits = jnp.log(jnp.asarray([0.2, 0.4, 0.2, 0.2]))
    for top_p, kept in ((0.3, [1]), (0.41, [0, 1, 2, 3])):
        assert np.flatnonzero(jnp.isfinite(sampling.nucleus(logits, top_p))).tolist() == kept


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_nucleus_of_a_large_vocabulary(top_p: float) -> None:
    """Zipfian, as text is."""
    rng = np.random.default_rng(0)
    exact = rng.permutation(np.log(1 / np.arange(1, 50_258))) + 0.1 * rng.standard_normal(50_257)
    logits = exact.astype(np.float32)
    filtered = np.asarray(jax.jit(sampling.nucleus)(logits, top_p))
    is_kept = np.isfinite(filtered)
    np.testing.assert_array_equal(filtered[is_kept], logits[is_kept])
    mass = np.cumsum(np.sort(scipy.special.softmax(np.float64(logits)))[::-1])
    if top_p == 1.0:
        assert is_kept.all()
    else:
        # The place where the sum reaches top_p, to the 1e-6 that float32 sums may be off.
        low, high = np.searchsorted(mass, [top_p - 1e-6, top_p + 1e-6]) + 1
        assert low <= is_kept.sum() <= high
        assert logits[is_kept].min() > logits[~is_kept].max()
