"""Weighted k-means for vocabularies: 10^5 rows, up to 10^3 clusters, a few hundred columns."""

import numpy as np
import scipy.sparse

from vqcx_jax.errors import DataError

# Elements of the largest temporary array: rows are taken in chunks.
_CHUNK = 2**22
# Iterations under the capacity, after free ones have found where clusters are.
_BALANCED_ITERATIONS = 5


def kmeans(
    vectors: np.ndarray,
    num_codes: int,
    *,
    seed: int,
    weights: np.ndarray | None = None,
    start: np.ndarray | None = None,
    iterations: int = 25,
    balanced: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters rows by Lloyd's algorithm; minimises the sum of weight x squared distance.

    A cluster that loses all its rows gets the row that is worst off, so none is empty at the end.

    Args:
        vectors: float (V, D).
        num_codes: K.
        seed: of the k-means++ start.
        weights: positive (V,); None: all equal.
        start: labels (V,) to start from instead.
        iterations: at most so many; fewer once no row changes its cluster.
        balanced: no cluster has more than ceil(V / K) rows.

    Returns:
        int32 (V,) clusters, and float32 (K, D) their weighted means.

    Raises:
        DataError: fewer distinct rows than clusters.
    """
    weights = np.ones(len(vectors)) if weights is None else weights
    weights = (weights / np.mean(weights)).astype(np.float32)
    # Distances lose digits when all rows are far from the origin.
    center = np.average(vectors, axis=0, weights=weights).astype(np.float32)
    vectors = vectors.astype(np.float32) - center
    if start is None:
        centroids = _plus_plus(vectors, num_codes, weights, np.random.default_rng(seed))
    else:
        centroids = weighted_means(vectors, start, weights, num_codes)
    labels = np.zeros(0, np.int32)
    for _ in range(iterations):
        previous, (labels, errors) = labels, _nearest(vectors, centroids)
        _fill_empty(labels, errors * weights, num_codes)
        centroids = weighted_means(vectors, labels, weights, num_codes)
        if np.array_equal(labels, previous):
            break
    if balanced:
        for _ in range(_BALANCED_ITERATIONS):
            labels, errors = _nearest_with_room(vectors, centroids, weights)
            _fill_empty(labels, errors * weights, num_codes)
            centroids = weighted_means(vectors, labels, weights, num_codes)
    return labels, centroids + center


def _plus_plus(
    vectors: np.ndarray, num_codes: int, weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    chosen: list[int] = []
    chances = weights.astype(np.float64)
    distances = np.full(len(vectors), np.inf)
    while len(chosen) < num_codes:
        total = chances.sum()
        if total == 0:
            raise DataError(
                f"num_codes={num_codes}: must be at most {len(chosen)}, "
                "the number of distinct rows of the vectors"
            )
        chosen.append(int(rng.choice(len(vectors), p=chances / total)))
        # Exact, unlike the distances of `_squared_distances`: a row that is chosen has 0.
        for rows in _chunks(len(vectors), vectors.shape[1]):
            difference = vectors[rows] - vectors[chosen[-1]]
            to_newest = np.einsum("vd,vd->v", difference, difference)
            np.minimum(distances[rows], to_newest, out=distances[rows])
        chances = weights * distances
    return vectors[chosen]


def _chunks(rows: int, columns: int) -> list[slice]:
    size = max(1, _CHUNK // columns)
    return [slice(first, first + size) for first in range(0, rows, size)]


def _squared_distances(x_VxD: np.ndarray, c_KxD: np.ndarray) -> np.ndarray:
    """(V, K), without the rows' own squared norms: enough to compare clusters."""
    d_VxK = x_VxD @ (-2 * c_KxD).T
    d_VxK += np.einsum("kd,kd->k", c_KxD, c_KxD)
    return d_VxK


def _nearest(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's nearest cluster, int32 (V,), and its squared distance to it."""
    labels = np.empty(len(vectors), np.int32)
    errors = np.einsum("vd,vd->v", vectors, vectors)
    for rows in _chunks(len(vectors), len(centroids)):
        distances = _squared_distances(vectors[rows], centroids)
        labels[rows] = np.argmin(distances, axis=1)
        errors[rows] += np.take_along_axis(distances, labels[rows, None], axis=1)[:, 0]
    return labels, errors


def _nearest_with_room(
    vectors: np.ndarray, centroids: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`_nearest` among clusters that have room, those served first for whom it matters most."""
    num_codes = len(centroids)
    room = np.full(num_codes, -(-len(vectors) // num_codes))
    labels = np.full(len(vectors), -1, np.int32)
    errors = np.einsum("vd,vd->v", vectors, vectors)
    waiting = np.arange(len(vectors))
    while len(waiting):
        open_codes = np.flatnonzero(room)
        wanted, distance, regret = _two_nearest(vectors[waiting], centroids[open_codes])
        # By cluster, and in it by what the second choice would cost.
        order = np.lexsort((-regret * weights[waiting], wanted))
        sizes = np.bincount(wanted, minlength=len(open_codes))
        rank = np.arange(len(waiting)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        served = order[rank < room[open_codes][wanted[order]]]
        labels[waiting[served]] = open_codes[wanted[served]]
        errors[waiting[served]] += distance[served]
        room -= np.bincount(labels[waiting[served]], minlength=num_codes)
        waiting = np.delete(waiting, served)
    return labels, errors


def _two_nearest(
    vectors: np.ndarray, centroids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest cluster, distance to it as in `_squared_distances`, and how much farther the next."""
    nearest = np.empty(len(vectors), np.int64)
    distance = np.empty(len(vectors), np.float32)
    regret = np.zeros(len(vectors), np.float32)
    for rows in _chunks(len(vectors), len(centroids)):
        distances = _squared_distances(vectors[rows], centroids)
        nearest[rows] = np.argmin(distances, axis=1)
        distance[rows] = np.min(distances, axis=1)
        if len(centroids) > 1:
            np.put_along_axis(distances, nearest[rows, None], np.inf, axis=1)
            regret[rows] = np.min(distances, axis=1) - distance[rows]
    return nearest, distance, regret


def _fill_empty(labels: np.ndarray, losses: np.ndarray, num_codes: int) -> None:
    """Moves the rows of the largest losses, one each, into empty clusters; changes `labels`."""
    sizes = np.bincount(labels, minlength=num_codes)
    empty = np.flatnonzero(sizes == 0)
    if not len(empty):
        return
    worst = iter(np.argsort(-losses, kind="stable"))
    for code in empty:
        row = next(row for row in worst if sizes[labels[row]] > 1)
        sizes[labels[row]] -= 1
        labels[row] = code


def weighted_means(
    vectors: np.ndarray, labels: np.ndarray, weights: np.ndarray, num_codes: int
) -> np.ndarray:
    """The mean of each cluster's rows, float32 (K, D). No cluster may be empty."""
    rows = np.arange(len(labels))
    weights = weights.astype(np.float32)
    members = scipy.sparse.csr_array((weights, (labels, rows)), shape=(num_codes, len(labels)))
    mass = np.bincount(labels, weights, minlength=num_codes).astype(np.float32)
    return (members @ vectors) / mass[:, None]
