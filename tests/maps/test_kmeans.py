"""k-means: finds clusters, heeds weights and capacities, never leaves a cluster empty."""

import numpy as np
import pytest

from vqcx_jax.errors import DataError
from vqcx_jax.maps import kmeans as module
from vqcx_jax.maps.kmeans import kmeans


@pytest.fixture(scope="module")
def clusters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors around well separated centres: (vectors, cluster of each, centres)."""
    rng = np.random.default_rng(0)
    centres = 10 * rng.standard_normal((6, 8))
    labels = rng.permutation(np.arange(200) % 6)
    vectors = centres[labels] + 0.1 * rng.standard_normal((200, 8))
    return vectors.astype(np.float32), labels, centres


def sizes_of(codes: np.ndarray, num_codes: int) -> np.ndarray:
    assert codes.dtype == np.int32
    return np.bincount(codes, minlength=num_codes)


def loss(vectors: np.ndarray, codes: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.sum((vectors - centroids[codes]) ** 2))


@pytest.mark.parametrize("seed", range(3))
def test_recovers_clusters(clusters: tuple[np.ndarray, ...], seed: int) -> None:
    vectors, labels, centres = clusters
    codes, centroids = kmeans(vectors, 6, seed=seed)
    assert sizes_of(codes, 6).min() >= 1
    assert centroids.dtype == np.float32
    assert len(set(zip(codes.tolist(), labels.tolist(), strict=True))) == 6
    for code in range(6):
        # The mean of 33 vectors of deviation 0.1 is its centre's to 0.1/sqrt(33) a coordinate.
        own = labels[codes == code][0]
        assert np.abs(centroids[code] - centres[own]).max() < 0.1
        np.testing.assert_allclose(centroids[code], vectors[codes == code].mean(0), atol=1e-5)


def test_far_from_the_origin(clusters: tuple[np.ndarray, ...]) -> None:
    """Distances are of rows to their mean: in float32, those to 1e4 would have no digit left."""
    vectors, labels, _ = clusters
    codes, _ = kmeans(vectors + np.float32(1e4), 6, seed=0)
    assert len(set(zip(codes.tolist(), labels.tolist(), strict=True))) == 6


def test_is_deterministic(clusters: tuple[np.ndarray, ...]) -> None:
    first, again = (kmeans(clusters[0], 9, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], kmeans(clusters[0], 9, seed=6)[0])


def test_a_code_for_each_vector() -> None:
    vectors = np.random.default_rng(0).standard_normal((12, 3))
    codes, centroids = kmeans(vectors, 12, seed=0)
    assert sorted(codes) == list(range(12))
    np.testing.assert_allclose(centroids[codes], vectors, atol=1e-6)


def test_seeds_every_distinct_vector_once() -> None:
    """The k-means++ start never takes a vector twice, so as many codes as vectors do fit."""
    vectors = np.repeat(np.eye(5, dtype=np.float32), 30, axis=0)
    for seed in range(5):
        codes, _ = kmeans(vectors, 5, seed=seed)
        np.testing.assert_array_equal(sizes_of(codes, 5), 30)


@pytest.mark.parametrize("num_codes", [4, 7])
def test_needs_distinct_vectors(num_codes: int) -> None:
    vectors = np.repeat(np.eye(3), 10, axis=0)
    with pytest.raises(DataError, match=f"^num_codes={num_codes}: must be at most 3, .*distinct"):
        kmeans(vectors, num_codes, seed=0)


def test_starts_from_labels(clusters: tuple[np.ndarray, ...]) -> None:
    vectors, labels, _ = clusters
    codes, centroids = kmeans(vectors, 6, seed=0, start=labels, iterations=1)
    np.testing.assert_array_equal(codes, labels)
    np.testing.assert_allclose(centroids[3], vectors[labels == 3].mean(0), atol=1e-5)


def test_weights_pull_centroids_and_attract_codes() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((400, 2)).astype(np.float32)
    weights = np.where(np.arange(400) < 200, 1000.0, 1.0)
    codes, centroids = kmeans(vectors, 20, seed=0, weights=weights)
    for code in range(20):
        rows = codes == code
        mean = np.average(vectors[rows], axis=0, weights=weights[rows])
        np.testing.assert_allclose(centroids[code], mean, atol=1e-4)
    heavy, light = (loss(vectors[r], codes[r], centroids) for r in (slice(200), slice(200, 400)))
    assert heavy < 0.8 * light
    # Only ratios matter.
    again, _ = kmeans(vectors, 20, seed=0, weights=weights * 2**-20)
    np.testing.assert_array_equal(codes, again)


def test_cluster_that_loses_its_rows_gets_the_worst_one() -> None:
    # From this start the middle centroid (at 10) is nearest to no row.
    vectors = np.asarray([[0.0], [1.0], [19.0], [21.0], [9.0 - 8.5], [11.0 + 8.5]], np.float32)
    start = np.asarray([0, 0, 2, 2, 1, 1])
    codes, _ = kmeans(vectors, 3, seed=0, start=start)
    assert sizes_of(codes, 3).min() >= 1


def test_no_cluster_is_empty_whatever_the_data() -> None:
    rng = np.random.default_rng(1)
    for seed in range(20):
        vectors = rng.integers(3, size=(40, 3)) ** 6  # Many equal rows, few far ones.
        distinct = len(np.unique(vectors, axis=0))
        for balanced in (False, True):
            codes, _ = kmeans(vectors, distinct, seed=seed, balanced=balanced)
            assert sizes_of(codes, distinct).min() >= 1


def test_chunks_do_not_show(
    clusters: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kmeans(clusters[0], 9, seed=5)
    whole_balanced = kmeans(clusters[0], 9, seed=5, balanced=True)
    monkeypatch.setattr(module, "_CHUNK", 64)
    np.testing.assert_array_equal(kmeans(clusters[0], 9, seed=5)[0], whole[0])
    chunked = kmeans(clusters[0], 9, seed=5, balanced=True)
    np.testing.assert_array_equal(chunked[0], whole_balanced[0])


# ---------------------------------------------------------------- balanced


@pytest.mark.parametrize(("rows", "num_codes"), [(200, 6), (200, 50), (201, 200), (10, 1)])
def test_no_cluster_exceeds_its_capacity(rows: int, num_codes: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((rows, 4)).astype(np.float32)
    vectors[: rows // 2] *= 0.01  # Half of the rows would like to share a cluster.
    free, _ = kmeans(vectors, num_codes, seed=0)
    codes, centroids = kmeans(vectors, num_codes, seed=0, balanced=True)
    sizes = sizes_of(codes, num_codes)
    assert sizes.min() >= 1 and sizes.max() <= -(-rows // num_codes)
    if num_codes in (6, 50):
        assert sizes_of(free, num_codes).max() > -(-rows // num_codes)  # It was needed,
        shuffled = rng.permutation(codes)
        means = np.stack([vectors[shuffled == code].mean(0) for code in range(num_codes)])
        # and is no mere dealing out.
        assert loss(vectors, codes, centroids) < 0.8 * loss(vectors, shuffled, means)


def test_balanced_leaves_balanced_clusters_alone() -> None:
    vectors = np.repeat(10 * np.eye(5, dtype=np.float32), 30, axis=0)
    vectors += 0.1 * np.random.default_rng(0).standard_normal(vectors.shape).astype(np.float32)
    free, _ = kmeans(vectors, 5, seed=1)
    np.testing.assert_array_equal(kmeans(vectors, 5, seed=1, balanced=True)[0], free)


def test_who_loses_most_is_served_first() -> None:
    """Rows 0 and 1 want the cluster of rows 2 and 3; row 0 is much nearer to the other one."""
    centroids = np.asarray([[0.0], [10.0]], np.float32)
    vectors = np.asarray([[4.0], [1.0], [0.0], [11.0]], np.float32)
    labels, errors = module._nearest_with_room(vectors, centroids, np.ones(4, np.float32))
    np.testing.assert_array_equal(labels, [1, 0, 0, 1])
    np.testing.assert_allclose(errors, [36, 1, 0, 1], atol=1e-5)
    weighted, _ = module._nearest_with_room(
        vectors, centroids, np.asarray([100, 1, 1, 1], np.float32)
    )
    np.testing.assert_array_equal(weighted, [0, 1, 0, 1])
