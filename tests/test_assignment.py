"""Maps from tokens to codes: what each promises, and what it says of bad input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcx_jax.assignment import (
    contiguous_map,
    frequency_map,
    kmeans_map,
    make_assignment,
    random_map,
)
from vqcx_jax.config.schema import VQHead
from vqcx_jax.errors import DataError

SIZES = [(1, 1), (7, 3), (100, 100), (1009, 37), (50_257, 503)]


def sizes_of(codes_of_tokens: np.ndarray, num_codes: int) -> np.ndarray:
    assert codes_of_tokens.dtype == np.int32
    assert codes_of_tokens.min() >= 0
    assert codes_of_tokens.max() < num_codes
    return np.bincount(codes_of_tokens, minlength=num_codes)


# ---------------------------------------------------------------- random, contiguous


@pytest.mark.parametrize(("vocab_size", "num_codes"), SIZES)
def test_random_map(vocab_size: int, num_codes: int) -> None:
    codes = random_map(vocab_size, num_codes, seed=3)
    sizes = sizes_of(codes, num_codes)
    assert len(codes) == vocab_size
    assert sizes.max() - sizes.min() <= 1 <= sizes.min()
    np.testing.assert_array_equal(codes, random_map(vocab_size, num_codes, seed=3))


def test_random_map_depends_on_the_seed_and_not_on_the_order_of_tokens() -> None:
    codes = random_map(1000, 10, seed=0)
    assert not np.array_equal(codes, random_map(1000, 10, seed=1))
    # Uncorrelated with the token's id: a correlation of 1000 pairs is below 4/sqrt(1000) = 0.13.
    assert abs(np.corrcoef(codes, np.arange(1000))[0, 1]) < 0.13


@pytest.mark.parametrize(("vocab_size", "num_codes"), SIZES)
def test_contiguous_map(vocab_size: int, num_codes: int) -> None:
    codes = contiguous_map(vocab_size, num_codes)
    sizes = sizes_of(codes, num_codes)
    assert len(codes) == vocab_size
    assert np.all(np.diff(codes) >= 0)
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
    codes = frequency_map(counts, num_codes)
    assert sizes_of(codes, num_codes).min() >= 1
    # Tokens by falling count, ties by id, have codes that rise by steps of one.
    by_count = codes[np.lexsort((np.arange(len(counts)), -counts))]
    assert by_count[0] == 0
    assert by_count[-1] == num_codes - 1
    assert set(np.diff(by_count)) <= {0, 1}
    np.testing.assert_array_equal(codes, frequency_map(counts, num_codes))


@settings(deadline=None)
@given(counts_and_codes())
def test_frequency_map_balances_mass(case: tuple[np.ndarray, int]) -> None:
    """A run stops at the first token that reaches an equal share of what was left for it."""
    counts, num_codes = case
    mass = np.maximum(counts, 1).astype(float)
    codes = frequency_map(counts, num_codes)
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
    np.testing.assert_array_equal(frequency_map(np.asarray(counts, dtype), num_codes), expected)


def test_frequency_map_of_a_zipfian_vocabulary() -> None:
    counts = (1e9 / np.arange(1, 50_258)).astype(np.int64)
    codes = frequency_map(counts, 503)
    sizes = sizes_of(codes, 503)
    assert sizes[0] == 1
    assert np.all(sizes[:50] == 1)
    assert sizes[-1] > 500
    # What ties cost: E[log n], in nats. A random map of equal sizes costs log(50257 / 503) = 4.6.
    cost = np.sum(counts * np.log(sizes[codes])) / counts.sum()
    assert cost < 3.0


# ---------------------------------------------------------------- k-means


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors around well separated centres: (vectors, cluster of each, centres)."""
    rng = np.random.default_rng(0)
    centres = 10 * rng.standard_normal((6, 8))
    labels = rng.permutation(np.arange(200) % 6)
    vectors = centres[labels] + 0.1 * rng.standard_normal((200, 8))
    return vectors.astype(np.float32), labels, centres


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_recovers_clusters(clusters: tuple[np.ndarray, ...], seed: int) -> None:
    vectors, labels, centres = clusters
    codes, centroids = kmeans_map(vectors, 6, seed)
    assert sizes_of(codes, 6).min() >= 1
    assert centroids.dtype == np.float32
    assert len(set(zip(codes.tolist(), labels.tolist(), strict=True))) == 6
    for code in range(6):
        # The mean of 33 vectors of deviation 0.1 is its centre's to 0.1/sqrt(33) a coordinate.
        own = labels[codes == code][0]
        assert np.abs(centroids[code] - centres[own]).max() < 0.1
        np.testing.assert_allclose(centroids[code], vectors[codes == code].mean(0), atol=1e-5)


def test_kmeans_is_deterministic(clusters: tuple[np.ndarray, ...]) -> None:
    first, again = (kmeans_map(clusters[0], 9, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], kmeans_map(clusters[0], 9, seed=6)[0])


def test_kmeans_with_a_code_for_each_vector() -> None:
    vectors = np.random.default_rng(0).standard_normal((12, 3))
    codes, centroids = kmeans_map(vectors, 12, seed=0)
    assert sorted(codes) == list(range(12))
    np.testing.assert_allclose(centroids[codes], vectors, rtol=1e-6)


def test_kmeans_seeds_every_distinct_vector_once() -> None:
    """The k-means++ start never takes a vector twice, so as many codes as vectors do fit."""
    vectors = np.repeat(np.eye(5, dtype=np.float32), 30, axis=0)
    for seed in range(5):
        codes, _ = kmeans_map(vectors, 5, seed)
        np.testing.assert_array_equal(sizes_of(codes, 5), 30)


@pytest.mark.parametrize("num_codes", [4, 7])
def test_kmeans_needs_distinct_vectors(num_codes: int) -> None:
    vectors = np.repeat(np.eye(3), 10, axis=0)
    with pytest.raises(DataError, match=f"^num_codes={num_codes}: must be at most 3, .*distinct"):
        kmeans_map(vectors, num_codes, seed=0)


# ---------------------------------------------------------------- make_assignment


def make(head: VQHead, vocab_size: int = 12, **changes: Any) -> Any:
    options: dict[str, Any] = {"embed_dim": 4, "counts": None, "seed": 0, **changes}
    return make_assignment(head, vocab_size=vocab_size, **options)


def test_each_kind() -> None:
    counts = np.arange(12)
    for head, expected in (
        (VQHead(num_codes=3, assignment="random"), random_map(12, 3, seed=7)),
        (VQHead(num_codes=3, assignment="contiguous"), contiguous_map(12, 3)),
        (VQHead(num_codes=3, assignment="frequency"), frequency_map(counts, 3)),
    ):
        actual = make(head, counts=counts, seed=7)
        np.testing.assert_array_equal(actual.codes_of_tokens, expected)
        assert actual.centroids is None


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int32])
def test_kmeans_from_a_file(tmp_path: Path, dtype: Any) -> None:
    vectors = np.arange(48).reshape(12, 4).astype(dtype)
    np.save(tmp_path / "v.npy", vectors)
    options: dict[str, Any] = dict(
        num_codes=3, assignment="kmeans", vectors=str(tmp_path / "v.npy")
    )
    codes, centroids = kmeans_map(vectors.astype(np.float32), 3, seed=0)
    only_map = make(VQHead(**options))
    np.testing.assert_array_equal(only_map.codes_of_tokens, codes)
    assert only_map.centroids is None
    both = make(VQHead(**options, code_init="centroids"))
    np.testing.assert_array_equal(both.centroids, centroids)


@pytest.mark.parametrize(("counts", "shape"), [(None, "None"), (np.ones(11, int), r"\(11,\)")])
def test_counts_must_fit(counts: np.ndarray | None, shape: str) -> None:
    with pytest.raises(DataError, match=rf"^counts of shape {shape}: .*\(12,\)$"):
        make(VQHead(num_codes=3, assignment="frequency"), counts=counts)


NOT_FINITE = np.ones((12, 4))
NOT_FINITE[3, 2] = np.nan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "not a readable .npy file", id="missing"),
        pytest.param(b"", "not a readable .npy file", id="empty"),
        pytest.param(b"hello world", "not a readable .npy file", id="text"),
        pytest.param(b"PK\x03\x04 zip?", "not a readable .npy file", id="broken_zip"),
        pytest.param(np.array([{}]), "not a readable .npy file", id="pickled"),
        pytest.param(np.ones((11, 4)), r"shape \(11, 4\).*one row a token, \(12, D\)", id="rows"),
        pytest.param(np.ones(12), r"shape \(12,\).*one row a token, \(12, D\)", id="one_axis"),
        pytest.param(np.array([["a"]] * 12), "has dtype <U1: expected numbers", id="strings"),
        pytest.param(NOT_FINITE, "must not contain NaN or infinity", id="nan"),
        pytest.param(np.eye(12, 5), "rows of width 5: .*needs embed_dim=4", id="width"),
        pytest.param(np.ones((12, 4)), "num_codes=3: must be at most 1", id="one_distinct_row"),
    ],
)
def test_bad_vectors_are_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "v.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    head = VQHead(num_codes=3, assignment="kmeans", vectors=str(path), code_init="centroids")
    with pytest.raises(DataError, match=message) as caught:
        make(head)
    assert "\n" not in str(caught.value)


def test_truncated_file_and_directory(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    np.save(path, np.ones((12, 4)))
    path.write_bytes(path.read_bytes()[:-1])
    for bad in (path, tmp_path):
        head = VQHead(num_codes=3, assignment="kmeans", vectors=str(bad))
        with pytest.raises(DataError, match="^model.head.vectors=.*not a readable .npy file$"):
            make(head)


def test_kmeans_without_a_file() -> None:
    with pytest.raises(DataError, match="^model.head.vectors=None: .*needs an .npy file"):
        make(VQHead(num_codes=3, assignment="kmeans"))
