"""Draws by blocks, against the softmax they are from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from drawn import assert_drawn_from
from versions import oldest_jax

from vqcx_jax.ops import device, sampling

pytestmark = oldest_jax

draw = jax.jit(sampling.draw)


def logits_of(vocab_size: int) -> np.ndarray:
    """Of text, where a third of the tokens is forbidden, among them whole blocks and both ends."""
    rng = np.random.default_rng(vocab_size)
    logits = -np.log(1 + rng.permutation(vocab_size)) + 0.1 * rng.standard_normal(vocab_size)
    if vocab_size > 2:
        logits[: vocab_size // 6] = logits[-(vocab_size // 6 + 1) :] = -np.inf
    return np.float32(logits)


# One block, the first size of several, whole and ragged ones.
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 64, 65, 100, 101, 5003])
def test_frequencies(vocab_size: int) -> None:
    logits = logits_of(vocab_size)
    rows = jnp.broadcast_to(logits, (100, 500, vocab_size))
    ids = draw(rows, jax.random.key(0))
    chex.assert_shape(ids, (100, 500))
    chex.assert_type(ids, jnp.int32)
    probabilities = scipy.special.softmax(np.float64(logits))
    assert_drawn_from(np.bincount(np.ravel(ids), minlength=vocab_size), probabilities)


def test_rows_have_their_own_distributions() -> None:
    rows = jnp.where(jnp.arange(300) == jnp.asarray([[7], [299], [150]]), 0.0, -jnp.inf)
    assert draw(rows, jax.random.key(0)).tolist() == [7, 299, 150]


def test_one_position_a_key() -> None:
    """As in generation: the block and its id must not come from the same bits."""
    keys = jax.random.split(jax.random.key(0), 100_000)
    ids = jax.vmap(draw, (None, 0))(jnp.zeros((100,)), keys)
    assert_drawn_from(np.bincount(ids, minlength=100), np.full(100, 0.01))


@pytest.mark.parametrize("vocab_size", [50, 5003])
def test_ends_of_the_random_numbers(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least and the largest one give the first and the last id that can be, and no other."""
    logits = logits_of(vocab_size)
    allowed = np.flatnonzero(logits > -np.inf)
    for share, expected in ((0.0, allowed[0]), (1 - 2.0**-23, allowed[-1]), (1.0, allowed[-1])):
        monkeypatch.setattr(jax.random, "uniform", lambda _, shape, s=share: jnp.full(shape, s))
        # The last one need not be as probable as a step of float32.
        logits[allowed[[0, -1]]] = np.max(logits)
        assert sampling.draw(jnp.asarray(logits), jax.random.key(0)) == expected


def test_largest_logits() -> None:
    rows = jnp.asarray([[3e38, -3e38, 3e38], [-3e38, -3e38, -jnp.inf]])
    ids = np.asarray(draw(jnp.broadcast_to(rows, (1000, 2, 3)), jax.random.key(0)))
    assert set(ids[:, 0]) == {0, 2}
    assert set(ids[:, 1]) == {0, 1}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("vocab_size", [7, 300])
def test_nan_gives_an_id_all_the_same(
    vocab_size: int, platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device(platform, ""))
    logits = jnp.zeros((2, vocab_size)).at[0, 5].set(jnp.nan).at[1].set(jnp.nan)
    ids = sampling.draw(logits, jax.random.key(0))
    assert jnp.all((ids >= 0) & (ids < vocab_size))


def test_no_rows() -> None:
    assert draw(jnp.zeros((0, 300)), jax.random.key(0)).shape == (0,)


def test_accelerators_take_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: device.Device("tpu", "TPU v5"))
    logits, key = (
        jnp.asarray(np.random.default_rng(0).standard_normal((40, 300))),
        jax.random.key(0),
    )
    ids = sampling.draw(logits, key)
    np.testing.assert_array_equal(ids, jax.random.categorical(key, logits))
