"""Classes of tokens that point the same way, and codes for them: for heads of kind "class_vq"."""

import numpy as np

from vqcx_jax.maps import quantize
from vqcx_jax.maps.fixed import by_frequency, random_map
from vqcx_jax.maps.kmeans import kmeans, weighted_means
from vqcx_jax.maps.token_map import TokenClasses, TokenMap

_ITERATIONS = 10
# Length of the noise on directions: k-means needs distinct rows, and unseen tokens are all alike.
_NOISE = 1e-3


def random_classes(
    counts: np.ndarray,
    num_classes: int,
    num_frequent: int,
    *,
    num_codes: int,
    num_codebooks: int,
    seed: int,
) -> TokenClasses:
    """Classes of equal size and codes for them, at random; the most frequent tokens are in none.

    Args:
        counts: int (V,) occurrences in the training text.
        seed: classes do not follow the codes that `random_map` deals out by the same seed.
    """
    tokens = by_frequency(counts)[num_frequent:]
    class_of = np.full(len(counts), -1, np.int32)
    class_of[tokens] = random_map(len(tokens), num_classes, seed + 1)[:, 0]
    codes = random_map(num_classes, num_codes, seed + 2, num_codebooks)
    return TokenClasses(class_of, codes)


def near_classes(
    token_map: TokenMap,
    weights: np.ndarray,
    num_classes: int,
    num_frequent: int,
    *,
    frequency_order: np.ndarray,
    seed: int,
) -> TokenClasses:
    """Classes of equal size of tokens whose vectors point the same way, by k-means.

    A class gets the product codes that come nearest to the mean of its tokens; where tokens have a
    scale, to its direction, and its length as the class's scale.

    Args:
        token_map: product codes with codebooks.
        weights: positive (V,), how much a token counts.
        frequency_order: int (V,), tokens from the most to the least frequent one.
    """
    assert token_map.codebooks is not None
    dim = sum(codebook.shape[1] for codebook in token_map.codebooks)
    tokens = frequency_order[num_frequent:]
    vectors = quantize.reconstruct(token_map.codes[tokens], token_map.codebooks, dim)
    if token_map.scale is not None:
        vectors = vectors * token_map.scale[tokens, None]
    directions, _ = quantize.directions(vectors)
    noise = np.random.default_rng(seed).standard_normal(directions.shape, np.float32)
    labels, _ = kmeans(
        directions + _NOISE * dim**-0.5 * noise,
        num_classes,
        seed=seed,
        weights=weights[tokens],
        iterations=_ITERATIONS,
        balanced=True,
    )
    means = weighted_means(vectors, labels, weights[tokens], num_classes)
    scale = None
    if token_map.scale is not None:
        means, scale = quantize.directions(means)
    class_of = np.full(token_map.vocab_size, -1, np.int32)
    class_of[tokens] = labels
    return TokenClasses(class_of, _nearest_codes(means, token_map.codebooks), scale)


def _nearest_codes(vectors: np.ndarray, codebooks: tuple[np.ndarray, ...]) -> np.ndarray:
    """Product codes of least squared error, int32 (C, M)."""
    slices = np.split(vectors, len(codebooks), axis=1)
    columns = []
    for x, codebook in zip(slices, codebooks, strict=True):
        distances = np.einsum("kd,kd->k", codebook, codebook) - 2 * x @ codebook.T
        columns.append(np.argmin(distances, axis=1))
    return np.stack(columns, axis=1).astype(np.int32)
