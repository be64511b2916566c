"""Vectors from co-occurrence for wide models: made with fewer dimensions, then widened."""

import dataclasses

import numpy as np

from vqcx_jax.maps.token_map import TokenMap

# The singular value decomposition and what follows it take time in proportion to the rank or worse.
_MAX_RANK = 512


def rank_for(width: int, num_slices: int = 1) -> int:
    """Dimensions of the vectors that are made for a model of some width.

    Args:
        width: D.
        num_slices: M; divides D, and the rank too.

    Returns:
        D up to 512, and about 512 beyond.
    """
    if width <= _MAX_RANK:
        return width
    return max(1, _MAX_RANK // num_slices) * num_slices


def widen(vectors: np.ndarray, width: int, num_slices: int = 1) -> np.ndarray:
    """Vectors of R columns as vectors of D columns with the same inner products.

    Each of M slices of R / M columns is multiplied by a random matrix with orthonormal rows, so
    that it fills its D / M columns: product codes of the one are product codes of the other, with
    the same error.

    Args:
        vectors: float (N, R).
        width: D, at least R.
        num_slices: M; divides R and D.

    Returns:
        float32 (N, D), with the same matrices on every call; `vectors` if R = D.
    """
    if vectors.shape[1] == width:
        return vectors
    slices = np.split(vectors, num_slices, axis=1)
    matrices = _matrices(vectors.shape[1], width, num_slices)
    return np.concatenate([x @ matrix for x, matrix in zip(slices, matrices, strict=True)], axis=1)


def widen_map(token_map: TokenMap, width: int, num_slices: int = 1) -> TokenMap:
    """The map with vectors of D columns, see `widen`; codes stay what they are.

    Args:
        token_map: with codebooks; of vectors of R columns.
        width: D, at least R.
        num_slices: the number of codebooks for form="product", 1 for "additive".
    """
    assert token_map.codebooks is not None
    rank = token_map.codebooks[0].shape[1] * num_slices
    if rank == width:
        return token_map
    matrices = _matrices(rank, width, num_slices)
    # Additive codebooks all share the one matrix.
    matrices *= token_map.num_codebooks // num_slices
    codebooks = tuple(
        codebook @ matrix for codebook, matrix in zip(token_map.codebooks, matrices, strict=True)
    )
    own = token_map.own_vectors
    return dataclasses.replace(
        token_map,
        codebooks=codebooks,
        own_vectors=None if own is None else widen(own, width, num_slices),
    )


def _matrices(rank: int, width: int, num_slices: int) -> list[np.ndarray]:
    """For each slice float32 (R / M, D / M) with orthonormal rows."""
    rng = np.random.default_rng(0)
    shape = (width // num_slices, rank // num_slices)
    return [
        np.linalg.qr(rng.standard_normal(shape))[0].T.astype(np.float32) for _ in range(num_slices)
    ]
