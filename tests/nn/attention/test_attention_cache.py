"""A KV cache, and where documents stand: ways to compute the same hidden states of a model."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kinds import (
    HEAD_DIM,
    NUM_KV_HEADS,
    POSITIONS,
    SEGMENTS,
    VOCAB_SIZE,
    WHOLE_MODELS,
    extend,
    hidden,
    make_model,
)
from versions import oldest_jax

from vqcx_jax.nn import KVCache

WITH_EVERY_JAX = ("complex", "harmonic2", "alibi_window")
ALL = pytest.mark.parametrize(
    "name",
    [
        name if name in WITH_EVERY_JAX else pytest.param(name, marks=oldest_jax)
        for name in WHOLE_MODELS
    ],
)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(VOCAB_SIZE, size=(2, 9)), jnp.int32)
ONE_DOCUMENT = jnp.ones_like(TOKENS), jnp.zeros_like(TOKENS) + jnp.arange(9)
KEY_WIDTHS = {
    "harmonic2": 2 * HEAD_DIM,
    "harmonic3_per_head": 3 * HEAD_DIM,
    "pope": 2 * HEAD_DIM,
    "pope_0.75_per_head_learned_ntk": 2 * HEAD_DIM,
}


def in_pieces(model: Any, cache: KVCache) -> tuple[Any, KVCache]:
    """A prompt of 4, a token, and 4 more."""
    outputs = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        h, cache = extend(model, TOKENS[:, start:end], cache, start)
        outputs.append(h)
    return jnp.concatenate(outputs, axis=1), cache


@ALL
def test_prefill_and_decode_equal_hidden(name: str) -> None:
    model = make_model(name)
    empty = model.empty_cache(2, 12)
    assert empty.k.shape == (2, 2, 16, NUM_KV_HEADS, KEY_WIDTHS.get(name, HEAD_DIM))
    assert empty.v.shape == (2, 2, 16, NUM_KV_HEADS, HEAD_DIM)
    # What lies beyond the filled part of a cache must not matter.
    actual, cache = in_pieces(model, KVCache(empty.k + 100.0, empty.v + 100.0))
    expected = hidden(model, TOKENS, *ONE_DOCUMENT)
    # Rounding of float32 through two layers; final states are about 0.4 in size.
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(cache.k[:, :, 9:], 100.0)


@oldest_jax
@pytest.mark.parametrize("name", ["complex", "harmonic3_per_head"])
def test_bfloat16_cache(name: str) -> None:
    model = make_model(name, dtype="bfloat16")
    empty = model.empty_cache(2, 12)
    actual, cache = in_pieces(model, empty)
    chex.assert_type([*empty, actual, *cache], jnp.bfloat16)
    expected = np.asarray(hidden(model, TOKENS, *ONE_DOCUMENT), np.float32)
    # The same keys and values; sums in another order are rounded another way, by 2^-8 and seldom.
    error = np.abs(np.asarray(actual, np.float32) - expected).max()
    assert error <= 2.0**-5 * np.abs(expected).max()


@ALL
def test_a_document_is_the_same_anywhere(name: str) -> None:
    """At the end of a row, at the start of another one, and with a constant added to positions."""
    model = make_model(name)
    document = TOKENS[0, 4:]
    tokens = TOKENS.at[1, :5].set(document)
    first, second = hidden(model, tokens, SEGMENTS, POSITIONS)
    chex.assert_trees_all_close(first[4:], second[:5], rtol=0, atol=1e-5)
    moved = hidden(model, tokens, SEGMENTS, POSITIONS + jnp.asarray([[37], [100]]))
    # Angles of up to 100 radians are rounded by 2^-18 = 4e-6, in each of two layers.
    chex.assert_trees_all_close(moved, jnp.stack([first, second]), rtol=0, atol=2e-5)
    # Distances do matter, but for attention that goes by the order of tokens alone.
    spread = hidden(model, tokens, SEGMENTS, 2 * POSITIONS)
    by_order = name.startswith(("alibi", "nope"))
    assert (float(jnp.max(jnp.abs(spread - moved))) < 1e-3) == by_order
