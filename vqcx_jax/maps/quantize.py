"""Vectors as sums of code vectors: product and residual (additive) quantisation."""

from functools import partial
from typing import NamedTuple

import numpy as np

from vqcx_jax.errors import DataError
from vqcx_jax.maps.kmeans import kmeans, weighted_means

# Alternations of k-means and rotation, and iterations of k-means in each but the last.
_ROTATIONS = 8
_ITERATIONS_PER_ROTATION = 5
# Passes over the codebooks in which each is fitted to the others.
_REFITS = 5


class Quantization(NamedTuple):
    """Codes of V vectors.

    codes: int32 (V, M).
    codebooks: M arrays float32 (K, D_m): D_m = D, or D / M of a product.
    rotation: float32 (D, D), orthogonal; the codes are those of vectors @ rotation.
        None: of the vectors as they are.
    """

    codes: np.ndarray
    codebooks: tuple[np.ndarray, ...]
    rotation: np.ndarray | None = None


def residual(
    vectors: np.ndarray,
    num_codebooks: int,
    num_codes: int,
    *,
    seed: int,
    weights: np.ndarray | None = None,
    balanced: bool = False,
) -> Quantization:
    """Sums of full-width code vectors: each codebook quantises what the ones before left.

    Args:
        vectors: float (V, D).
        num_codebooks: M; with one, this is k-means.
        num_codes: K.
        seed: of the k-means.
        weights: positive (V,), what an error of each vector costs; None: all equal.
        balanced: every code has at most ceil(V / K) vectors.

    Raises:
        DataError: too few distinct vectors, or distinct rests of them, for K codes.
    """
    rest = vectors.astype(np.float32)
    codes, codebooks = [], []
    for m in range(num_codebooks):
        labels, centroids = kmeans(
            rest, num_codes, seed=seed + m, weights=weights, balanced=balanced
        )
        rest = rest - centroids[labels]
        codes.append(labels)
        codebooks.append(centroids)
    return Quantization(np.stack(codes, axis=1), tuple(codebooks))


def product(
    vectors: np.ndarray,
    num_codebooks: int,
    num_codes: int,
    *,
    seed: int,
    weights: np.ndarray | None = None,
    balanced: bool = False,
    rotate: bool = True,
) -> Quantization:
    """M slices of D / M columns, each quantised on its own.

    Args:
        rotate: first turn the vectors so that slices lose least, by alternating between codes and
            rotation as in OPQ (Ge et al. 2013, "Optimized Product Quantization").
        vectors, num_codebooks, num_codes, seed, weights, balanced: see `residual`.

    Raises:
        DataError: M does not divide D, or too few distinct slices for K codes.
    """
    dim = vectors.shape[1]
    if dim % num_codebooks:
        raise DataError(
            f"num_codebooks={num_codebooks}: must divide {dim}, the width of the vectors"
        )
    vectors = vectors.astype(np.float32)
    weights = np.ones(len(vectors)) if weights is None else weights
    rotation = _random_rotation(dim, seed) if rotate else None
    codes = None
    for _ in range(_ROTATIONS if rotate else 0):
        codes, codebooks = _quantize_slices(
            vectors @ rotation,
            num_codebooks,
            num_codes,
            seed=seed,
            weights=weights,
            start=codes,
            iterations=_ITERATIONS_PER_ROTATION,
        )
        rotation = _best_rotation(vectors, _concatenated(codes, codebooks), weights)
    codes, codebooks = _quantize_slices(
        vectors if rotation is None else vectors @ rotation,
        num_codebooks,
        num_codes,
        seed=seed,
        weights=weights,
        start=codes,
        balanced=balanced,
    )
    return Quantization(codes, codebooks, rotation)


def refit(
    codes: np.ndarray, codebooks: tuple[np.ndarray, ...], vectors: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Codebooks of less error for the same codes: each the mean of what the others leave.

    Args:
        codes: int32 (V, M).
        codebooks: M arrays float32 (K, D), or (K, D / M) of a product.
        vectors: float32 (V, D) in the space of the codebooks.
        weights: positive (V,).

    Returns:
        As `codebooks`; code vectors that no row has are left as they are.
    """
    dim = vectors.shape[1]
    if codebooks[0].shape[1] != dim:
        slices = np.split(vectors, len(codebooks), axis=1)
        return tuple(map(partial(_fit, weights=weights), codebooks, slices, codes.T))
    refitted = list(codebooks)
    rest = vectors - reconstruct(codes, codebooks, dim)
    for _ in range(_REFITS):
        for m, column in enumerate(codes.T):
            rest += refitted[m][column]
            refitted[m] = _fit(refitted[m], rest, column, weights)
            rest -= refitted[m][column]
    return tuple(refitted)


def full_width(codebooks: tuple[np.ndarray, ...], dim: int) -> tuple[np.ndarray, ...]:
    """Codebooks of slices as codebooks of D columns, zero outside their slice.

    Codebooks that have D columns already are returned as they are.
    """
    if codebooks[0].shape[1] == dim:
        return codebooks
    wide, first = [], 0
    for codebook in codebooks:
        last = first + codebook.shape[1]
        wide.append(np.pad(codebook, ((0, 0), (first, dim - last))))
        first = last
    return tuple(wide)


def reconstruct(codes: np.ndarray, codebooks: tuple[np.ndarray, ...], dim: int) -> np.ndarray:
    """The vectors that codes stand for, in the space of the codebooks. Float32 (V, D)."""
    if codebooks[0].shape[1] != dim:
        return _concatenated(codes, codebooks)
    return sum(
        (codebook[codes[:, m]] for m, codebook in enumerate(codebooks)),
        start=np.zeros((len(codes), dim), np.float32),
    )


def directions(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows over their lengths (V, D), zeros as they are, and the lengths (V,)."""
    norms = np.linalg.norm(vectors, axis=1)
    return vectors / np.where(norms > 0, norms, 1)[:, None], norms


def distortion(vectors: np.ndarray, approximations: np.ndarray, weights: np.ndarray) -> float:
    """Weighted squared error over that of the weighted mean: 0 is exact, 1 is no information."""
    mean = np.average(vectors, axis=0, weights=weights)
    error = np.sum(weights * np.sum((vectors - approximations) ** 2, axis=1))
    spread = np.sum(weights * np.sum((vectors - mean) ** 2, axis=1))
    return float(error / spread) if spread else 0.0


def _quantize_slices(
    vectors: np.ndarray,
    num_codebooks: int,
    num_codes: int,
    *,
    seed: int,
    weights: np.ndarray,
    start: np.ndarray | None,
    iterations: int = 25,
    balanced: bool = False,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    codes, codebooks = [], []
    for m, columns in enumerate(np.split(vectors, num_codebooks, axis=1)):
        labels, centroids = kmeans(
            np.ascontiguousarray(columns),
            num_codes,
            seed=seed + m,
            weights=weights,
            start=None if start is None else start[:, m],
            iterations=iterations,
            balanced=balanced,
        )
        codes.append(labels)
        codebooks.append(centroids)
    return np.stack(codes, axis=1), tuple(codebooks)


def _fit(
    codebook: np.ndarray, vectors: np.ndarray, codes: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    used, labels = np.unique(codes, return_inverse=True)
    fitted = codebook.copy()
    fitted[used] = weighted_means(vectors, labels, weights, len(used))
    return fitted


def _concatenated(codes: np.ndarray, codebooks: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([book[codes[:, m]] for m, book in enumerate(codebooks)], axis=1)


def _random_rotation(dim: int, seed: int) -> np.ndarray:
    # Spreads what matters over all slices; columns of an SVD are sorted by importance.
    normal = np.random.default_rng(seed).standard_normal((dim, dim))
    return np.linalg.qr(normal)[0].astype(np.float32)


def _best_rotation(
    vectors: np.ndarray, approximations: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """The orthogonal matrix that brings the vectors nearest to their approximations."""
    weights = (weights / np.mean(weights)).astype(np.float32)
    u, _, vt = np.linalg.svd((vectors * weights[:, None]).T @ approximations)
    return (u @ vt).astype(np.float32)
