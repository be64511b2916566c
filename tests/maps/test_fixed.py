"""Maps without vectors: equal sizes, runs of equal mass, unique tuples of codes."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcx_jax.maps.fixed import contiguous_map, frequency_map, random_map

SIZES = [(1, 1), (7, 3), (100, 100), (1009, 37), (50_257, 503)]


def sizes_of(codes: np.ndarray, num_codes: int) -> np.ndarray:
    assert codes.dtype == np.int32
    assert codes.min() >= 0
    assert codes.max() < num_codes
    return np.bincount(codes, minlength=num_codes)


# ---------------------------------------------------------------- random, contiguous


@pytest.mark.parametrize(("vocab_size", "num_codes"), SIZES)
def test_random_map(vocab_size: int, num_codes: int) -> None:
    codes = random_map(vocab_size, num_codes, seed=3)
    assert codes.shape == (vocab_size, 1)
    sizes = sizes_of(codes[:, 0], num_codes)
    assert sizes.max() - sizes.min() <= 1 <= sizes.min()
    np.testing.assert_array_equal(codes, random_map(vocab_size, num_codes, seed=3))


def test_random_map_depends_on_the_seed_and_not_on_the_order_of_tokens() -> None:
    codes = random_map(1000, 10, seed=0)
    assert not np.array_equal(codes, random_map(1000, 10, seed=1))
    # Uncorrelated with the token's id: a correlation of 1000 pairs is below 4/sqrt(1000) = 0.13.
    assert abs(np.corrcoef(codes[:, 0], np.arange(1000))[0, 1]) < 0.13


@pytest.mark.parametrize(
    ("vocab_size", "num_codes", "num_codebooks"),
    [
        pytest.param(25, 5, 2, id="every_tuple"),
        pytest.param(33_278, 183, 2, id="nearly_every_tuple"),
        pytest.param(23, 5, 2, id="ragged"),
        pytest.param(26, 5, 2, id="one_tuple_too_few"),
        pytest.param(1000, 5, 2, id="forty_tokens_a_tuple"),
        pytest.param(1000, 10, 3, id="three"),
        pytest.param(33_278, 256, 16, id="sixteen"),
        pytest.param(6, 1, 2, id="one_code"),
    ],
)
def test_random_map_of_several_codebooks(
    vocab_size: int, num_codes: int, num_codebooks: int
) -> None:
    codes = random_map(vocab_size, num_codes, 0, num_codebooks)
    assert codes.shape == (vocab_size, num_codebooks)
    for column in codes.T:
        sizes = sizes_of(column, num_codes)
        assert sizes.max() - sizes.min() <= 1
    tuples, sizes = np.unique(codes, axis=0, return_counts=True)
    assert len(tuples) == min(vocab_size, num_codes**num_codebooks)
    assert sizes.max() - sizes.min() <= 1


def test_codebooks_of_a_random_map_say_different_things() -> None:
    codes = random_map(33_278, 256, 0, 16)
    for m in range(1, 16):
        # Tokens with the same first code: 130 of each. Their second codes are as if thrown.
        seconds = codes[codes[:, 0] == 7, m]
        assert len(seconds) == 130
        assert len(np.unique(seconds)) > 80  # Expected: 256 (1 - (255/256)^130) = 102, +- 5.


@pytest.mark.parametrize(("vocab_size", "num_codes"), SIZES)
def test_contiguous_map(vocab_size: int, num_codes: int) -> None:
    codes = contiguous_map(vocab_size, num_codes)
    assert codes.shape == (vocab_size, 1)
    sizes = sizes_of(codes[:, 0], num_codes)
    assert np.all(np.diff(codes[:, 0]) >= 0)
    assert sizes.max() - sizes.min() <= 1 <= sizes.min()


# ---------------------------------------------------------------- frequency


@st.composite
def counts_and_codes(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    size = draw(st.sampled_from([3, 10**9]))  # Many ties, or hardly any.
    counts = draw(st.lists(st.integers(0, size), min_size=1, max_size=60))
    return np.asarray(counts, np.int64), draw(st.integers(1, len(counts)))


@settings(deadline=None)
@given(counts_and_codes())
def test_frequency_map_cuts_the_sorted_tokens_into_runs(case: tuple[np.ndarray, int]) -> None:
    counts, num_codes = case
    codes = frequency_map(counts, num_codes)[:, 0]
    assert sizes_of(codes, num_codes).min() >= 1
    # Tokens by falling count, ties by id, have codes that rise by steps of one.
    by_count = codes[np.lexsort((np.arange(len(counts)), -counts))]
    assert by_count[0] == 0
    assert by_count[-1] == num_codes - 1
    assert set(np.diff(by_count)) <= {0, 1}


@settings(deadline=None)
@given(counts_and_codes())
def test_frequency_map_balances_mass(case: tuple[np.ndarray, int]) -> None:
    """A run stops at the first token that reaches an equal share of what was left for it."""
    counts, num_codes = case
    mass = np.maximum(counts, 1).astype(float)
    codes = frequency_map(counts, num_codes)[:, 0]
    order = np.argsort(-counts, kind="stable")
    for code in range(num_codes - 1):
        run = mass[order][codes[order] == code]
        left = mass[codes >= code].sum()
        share = left / (num_codes - code)
        assert run[:-1].sum() < share * (1 + 1e-9)
        more_would_empty_a_code = (codes > code).sum() == num_codes - code - 1
        assert run.sum() >= share * (1 - 1e-9) or more_would_empty_a_code


@pytest.mark.parametrize(
    ("counts", "num_codes", "expected"),
    [
        pytest.param([5, 9, 1, 7], 4, [2, 0, 3, 1], id="a_code_for_each"),
        pytest.param([5, 9, 1, 7], 1, [0, 0, 0, 0], id="one_code"),
        pytest.param([4] * 6, 3, [0, 0, 1, 1, 2, 2], id="all_equal"),
        pytest.param([4] * 7, 3, [0, 0, 0, 1, 1, 2, 2], id="all_equal_ragged"),
        pytest.param([0] * 6, 2, [0, 0, 0, 1, 1, 1], id="nothing_seen"),
        pytest.param([100, 0, 0, 0, 100, 0], 3, [0, 2, 2, 2, 1, 2], id="zeros_share"),
        pytest.param([1000, 1, 1, 1, 1, 1], 3, [0, 1, 1, 1, 2, 2], id="one_giant"),
        pytest.param([0, 3, 0, 8], 4, [2, 1, 3, 0], id="zeros_and_a_code_for_each"),
    ],
)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32, np.uint64])
def test_frequency_map_by_hand(
    counts: list[int], num_codes: int, expected: list[int], dtype: Any
) -> None:
    codes = frequency_map(np.asarray(counts, dtype), num_codes)
    np.testing.assert_array_equal(codes[:, 0], expected)


def test_frequency_map_of_a_zipfian_vocabulary() -> None:
    counts = (1e9 / np.arange(1, 50_258)).astype(np.int64)
    codes = frequency_map(counts, 503)[:, 0]
    sizes = sizes_of(codes, 503)
    assert np.all(sizes[:50] == 1)
    assert sizes[-1] > 500
    # What ties cost: E[log n], in nats. A random map of equal sizes costs log(50257 / 503) = 4.6.
    cost = np.sum(counts * np.log(sizes[codes])) / counts.sum()
    assert cost < 3.0
