"""Tuples of codes made distinct, at the smallest cost that a greedy choice finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcx_jax.errors import DataError
from vqcx_jax.maps.unique import make_unique

# Sums of one of 0, 10, 20 and one of 0, 1, 2.
TENS = np.asarray([[0.0], [10.0], [20.0]], np.float32)
ONES = np.asarray([[0.0], [1.0], [2.0]], np.float32)


def unique(codes: list[list[int]], vectors: list[float]) -> list[list[int]]:
    arrays = np.asarray(codes, np.int32), np.asarray(vectors, np.float32)[:, None]
    return make_unique(*arrays, (TENS, ONES)).tolist()


def test_distinct_codes_stay() -> None:
    codes = [[0, 0], [0, 1], [2, 1]]
    assert unique(codes, [0, 1, 21]) == codes


def test_the_first_keeps_its_codes_and_others_take_the_nearest_free_last_code() -> None:
    # 0.6 is nearest to 1, which is taken; then to 0, which is free.
    assert unique([[0, 1], [0, 1]], [1.4, 0.6]) == [[0, 1], [0, 0]]
    assert unique([[0, 1], [0, 1]], [0.6, 1.4]) == [[0, 1], [0, 2]]


def test_codes_that_a_later_token_has_are_not_free() -> None:
    # Token 1 would take 0, but token 2 has it.
    assert unique([[0, 1], [0, 1], [0, 0]], [1.0, 0.9, 0.0]) == [[0, 1], [0, 2], [0, 0]]


def test_a_full_row_sends_tokens_to_the_nearest_row() -> None:
    codes = [[0, 0], [0, 1], [0, 2], [0, 2], [0, 2]]
    # 9 goes to 10 + 0; what 16 leaves of 10 is 6: to 10 + 2; but 16 is nearer to 20.
    assert unique(codes, [0, 1, 2, 9, 14.9])[3:] == [[1, 0], [1, 2]]
    assert unique(codes, [0, 1, 2, 9, 16])[3:] == [[1, 0], [2, 0]]


def test_all_tokens_alike_fill_every_tuple() -> None:
    codes = unique([[1, 1]] * 9, [11.0] * 9)
    assert sorted(codes) == [[i, j] for i in range(3) for j in range(3)]
    assert codes[0] == [1, 1]
    assert {tuple(row) for row in codes[:3]} == {(1, 0), (1, 1), (1, 2)}


def test_too_few_tuples() -> None:
    message = "^num_codes=3, num_codebooks=2: make 9 tuples, fewer than the 10 tokens"
    with pytest.raises(DataError, match=message):
        unique([[1, 1]] * 10, [11.0] * 10)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32), st.floats(0, 1))
def test_rows_are_distinct(k: int, m: int, seed: int, load: float) -> None:
    rng = np.random.default_rng(seed)
    tokens = max(1, round(load * k**m))
    codes = (rng.random((tokens, m)) ** 3 * k).astype(np.int32)
    books = tuple(rng.standard_normal((k, 3)).astype(np.float32) for _ in range(m))
    vectors = rng.standard_normal((tokens, 3)).astype(np.float32)
    before = codes.copy()
    result = make_unique(codes, vectors, books)
    np.testing.assert_array_equal(codes, before)
    assert result.min() >= 0 and result.max() < k
    assert len(np.unique(result, axis=0)) == tokens
    # The first of each tuple keeps it.
    _, first = np.unique(codes, axis=0, return_index=True)
    np.testing.assert_array_equal(result[first], codes[first])
    # As many leading codes as have room are kept.
    for moved, old in zip(result, codes, strict=True):
        if m > 1 and np.sum(np.all(codes[:, : m - 1] == old[: m - 1], axis=1)) <= k:
            sharers = np.all(result[:, : m - 1] == old[: m - 1], axis=1).sum()
            assert np.array_equal(moved[: m - 1], old[: m - 1]) or sharers == k
