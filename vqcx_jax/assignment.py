"""Maps from tokens to codes that are fixed before training ("preassigned").

A map is an int32 array (V,) with values in [0, K). Host-side numpy: it is made once.
"""

from typing import NamedTuple

import numpy as np
from scipy.cluster.vq import ClusterError, kmeans2

from vqcx_jax.config import schema
from vqcx_jax.errors import DataError


class Assignment(NamedTuple):
    """codes_of_tokens: int32 (V,). centroids: float32 (K, D) to start the codebook, or None."""

    codes_of_tokens: np.ndarray
    centroids: np.ndarray | None = None


def make_assignment(
    head: schema.VQHead,
    *,
    vocab_size: int,
    embed_dim: int,
    counts: np.ndarray | None,
    seed: int,
) -> Assignment:
    """The map that a config asks for.

    Args:
        counts: int (V,) occurrences in the training text; needed for "frequency" only.
        seed: for "random" and "kmeans".

    Raises:
        DataError: counts or vectors that do not fit the vocabulary or the model.
    """
    if head.assignment == "random":
        return Assignment(random_map(vocab_size, head.num_codes, seed))
    if head.assignment == "contiguous":
        return Assignment(contiguous_map(vocab_size, head.num_codes))
    if head.assignment == "frequency":
        if counts is None or counts.shape != (vocab_size,):
            shape = None if counts is None else counts.shape
            raise DataError(f"counts of shape {shape}: expected one a token, ({vocab_size},)")
        return Assignment(frequency_map(counts, head.num_codes))
    vectors = _load_vectors(head.vectors, vocab_size)
    codes_of_tokens, centroids = kmeans_map(vectors, head.num_codes, seed)
    if head.code_init == "random":
        return Assignment(codes_of_tokens)
    if centroids.shape[1] != embed_dim:
        raise DataError(
            f"model.head.vectors={head.vectors!r} has rows of width {centroids.shape[1]}: "
            f"code_init='centroids' needs embed_dim={embed_dim}"
        )
    return Assignment(codes_of_tokens, centroids)


def random_map(vocab_size: int, num_codes: int, seed: int) -> np.ndarray:
    """Codes of equal size (within one token), at random. int32 (V,)."""
    codes = np.arange(vocab_size, dtype=np.int32) % num_codes
    return np.random.default_rng(seed).permutation(codes)


def contiguous_map(vocab_size: int, num_codes: int) -> np.ndarray:
    """Consecutive token ids share a code; sizes differ by at most one. int32 (V,)."""
    return (np.arange(vocab_size, dtype=np.int64) * num_codes // vocab_size).astype(np.int32)


def frequency_map(counts: np.ndarray, num_codes: int) -> np.ndarray:
    """Tokens in order of falling frequency, cut into K runs of about equal frequency mass.

    The most frequent tokens so get a code of their own and rare ones share: runs of equal mass
    keep E[log n_code], the loss that ties cost when tokens have no bias, low.

    Args:
        counts: (V,) occurrences; unseen tokens count as one.

    Returns:
        int32 (V,); every code has at least one token (K <= V).
    """
    counts = counts.astype(np.int64)  # Unsigned zeros would come first below.
    order = np.argsort(-counts, kind="stable")
    mass = np.maximum(counts[order], 1).astype(np.float64)
    ends = np.cumsum(mass)
    starts, start, done = [], 0, 0.0
    for code in range(num_codes):
        starts.append(start)
        codes_left = num_codes - code
        target = done + (ends[-1] - done) / codes_left
        stop = int(np.searchsorted(ends, target * (1 - 1e-12))) + 1
        start = min(max(stop, start + 1), len(counts) - (codes_left - 1))
        done = ends[start - 1]
    sizes = np.diff([*starts, len(counts)])
    codes_of_tokens = np.empty(len(counts), np.int32)
    codes_of_tokens[order] = np.repeat(np.arange(num_codes, dtype=np.int32), sizes)
    return codes_of_tokens


def kmeans_map(
    vectors: np.ndarray, num_codes: int, seed: int, iterations: int = 25
) -> tuple[np.ndarray, np.ndarray]:
    """k-means (k-means++ start) on one vector a token.

    Args:
        vectors: float (V, D).

    Returns:
        int32 (V,) and the centroids, float32 (K, D).

    Raises:
        DataError: fewer distinct vectors than codes, so that a cluster stays empty.
    """
    vectors = vectors.astype(np.float32)
    start = _plus_plus(vectors, num_codes, np.random.default_rng(seed))
    try:
        centroids, labels = kmeans2(
            vectors, start, iter=iterations, minit="matrix", missing="raise"
        )
    except ClusterError as error:
        raise DataError(
            f"num_codes={num_codes}: k-means left a cluster empty; "
            "use fewer codes or vectors with more distinct rows"
        ) from error
    return labels.astype(np.int32), centroids


def _plus_plus(vectors: np.ndarray, num_codes: int, rng: np.random.Generator) -> np.ndarray:
    # scipy has this start too, but in O(V K^2 D): half an hour for a real vocabulary.
    chosen = [int(rng.integers(len(vectors)))]
    distances = np.full(len(vectors), np.inf)
    while len(chosen) < num_codes:
        to_newest = np.sum((vectors - vectors[chosen[-1]]) ** 2, axis=1, dtype=np.float64)
        distances = np.minimum(distances, to_newest)
        total = distances.sum()
        if total == 0:
            raise DataError(
                f"num_codes={num_codes}: must be at most {len(chosen)}, "
                "the number of distinct rows of the vectors"
            )
        chosen.append(int(rng.choice(len(vectors), p=distances / total)))
    return vectors[chosen]


def _load_vectors(path: str | None, vocab_size: int) -> np.ndarray:
    if path is None:
        raise DataError("model.head.vectors=None: assignment='kmeans' needs an .npy file")
    try:
        with open(path, "rb") as file:
            vectors = np.lib.format.read_array(file)
    except (OSError, ValueError) as error:
        raise DataError(f"model.head.vectors={path!r}: not a readable .npy file") from error
    if vectors.dtype.kind not in "fiu":
        raise DataError(f"model.head.vectors={path!r} has dtype {vectors.dtype}: expected numbers")
    if vectors.ndim != 2 or vectors.shape[0] != vocab_size:
        raise DataError(
            f"model.head.vectors={path!r} has shape {vectors.shape}: "
            f"expected one row a token, ({vocab_size}, D)"
        )
    if not np.isfinite(vectors).all():
        raise DataError(f"model.head.vectors={path!r}: must not contain NaN or infinity")
    return vectors
