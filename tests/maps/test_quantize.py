"""Product and residual quantisation: what they approximate, and how well."""

import numpy as np
import pytest

from vqcx_jax.errors import DataError
from vqcx_jax.maps import quantize
from vqcx_jax.maps.kmeans import kmeans
from vqcx_jax.maps.quantize import product, reconstruct, refit, residual

RNG = np.random.default_rng(0)
# Columns of very different variance, mixed by a rotation: where rotating helps a product.
SPREAD = RNG.standard_normal((600, 8)) * 2.0 ** -np.arange(8)
VECTORS = (SPREAD @ np.linalg.qr(RNG.standard_normal((8, 8)))[0]).astype(np.float32)
WEIGHTS = 1.0 / np.arange(1, 601)


def error(vectors: np.ndarray, codes: np.ndarray, codebooks: tuple[np.ndarray, ...]) -> float:
    approximations = reconstruct(codes, codebooks, vectors.shape[1])
    return quantize.distortion(vectors, approximations, WEIGHTS)


def test_distortion_by_hand() -> None:
    vectors = np.asarray([[0.0, 0], [4, 0], [4, 3]], np.float32)
    approximations = np.asarray([[1.0, 0], [4, 0], [4, 1]], np.float32)
    # Mean (3, 1); spreads 10, 2, 5 times weights 1, 2, 1.
    weights = np.asarray([1.0, 2, 1])
    mean = np.average(vectors, axis=0, weights=weights)
    np.testing.assert_allclose(mean, [3, 0.75])
    spread = (9 + 0.5625) + 2 * (1 + 0.5625) + (1 + 5.0625)
    assert quantize.distortion(vectors, approximations, weights) == pytest.approx(5 / spread)
    assert quantize.distortion(vectors, vectors, weights) == 0
    same = np.ones((3, 2), np.float32)
    assert quantize.distortion(same, same, weights) == 0


def test_full_width_codebooks_have_the_same_sums() -> None:
    codes = RNG.integers(5, size=(20, 4))
    slices = tuple(RNG.standard_normal((5, 2)).astype(np.float32) for _ in range(4))
    wide = quantize.full_width(slices, 8)
    assert [book.shape for book in wide] == [(5, 8)] * 4
    by_hand = [np.concatenate([slices[m][c] for m, c in enumerate(row)]) for row in codes]
    np.testing.assert_array_equal(reconstruct(codes, slices, 8), by_hand)
    np.testing.assert_allclose(reconstruct(codes, wide, 8), by_hand, rtol=1e-6)
    assert quantize.full_width(wide, 8) is wide


# ---------------------------------------------------------------- residual


def test_one_codebook_is_kmeans() -> None:
    codes, codebooks, rotation = residual(VECTORS, 1, 20, seed=3, weights=WEIGHTS)
    labels, centroids = kmeans(VECTORS, 20, seed=3, weights=WEIGHTS)
    np.testing.assert_array_equal(codes[:, 0], labels)
    np.testing.assert_array_equal(codebooks[0], centroids)
    assert rotation is None


def test_each_codebook_quantises_what_is_left() -> None:
    codes, codebooks, _ = residual(VECTORS, 3, 16, seed=0, weights=WEIGHTS)
    assert codes.shape == (600, 3) and codes.dtype == np.int32
    assert [book.shape for book in codebooks] == [(16, 8)] * 3
    rest = VECTORS - codebooks[0][codes[:, 0]]
    for code in range(16):
        rows = codes[:, 1] == code
        mean = np.average(rest[rows], axis=0, weights=WEIGHTS[rows])
        np.testing.assert_allclose(codebooks[1][code], mean, atol=1e-5)
    errors = [error(VECTORS, codes[:, :m], codebooks[:m]) for m in (1, 2, 3)]
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.6 * errors[1]


# ---------------------------------------------------------------- product


def test_product_quantises_slices() -> None:
    codes, codebooks, rotation = product(VECTORS, 4, 16, seed=0, weights=WEIGHTS)
    rotation_free = product(VECTORS, 4, 16, seed=0, weights=WEIGHTS, rotate=False)
    assert rotation is not None and rotation_free.rotation is None
    codes, codebooks, _ = rotation_free
    assert codes.shape == (600, 4)
    assert [book.shape for book in codebooks] == [(16, 2)] * 4
    third = VECTORS[:, 4:6]
    for code in range(16):
        rows = codes[:, 2] == code
        mean = np.average(third[rows], axis=0, weights=WEIGHTS[rows])
        np.testing.assert_allclose(codebooks[2][code], mean, atol=1e-5)


def test_rotation_is_orthogonal_and_helps() -> None:
    codes, codebooks, rotation = product(VECTORS, 4, 16, seed=0, weights=WEIGHTS)
    assert rotation is not None
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(8), atol=1e-5)
    rotated = error(VECTORS @ rotation, codes, codebooks)
    plain = product(VECTORS, 4, 16, seed=0, weights=WEIGHTS, rotate=False)
    assert rotated < 0.85 * error(VECTORS, *plain[:2])


def test_best_rotation_undoes_one() -> None:
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0].astype(np.float32)
    # As large in all directions: a rotation among directions that hardly occur is hard to find.
    vectors = rng.standard_normal((600, 8)).astype(np.float32)
    found = quantize._best_rotation(vectors, vectors @ rotation, WEIGHTS)
    np.testing.assert_allclose(found, rotation, atol=1e-4)


def test_slices_must_fit() -> None:
    with pytest.raises(DataError, match="^num_codebooks=3: must divide 8, the width of the vec"):
        product(VECTORS, 3, 16, seed=0)


@pytest.mark.parametrize("method", [product, residual])
def test_balanced_and_deterministic(method: type) -> None:
    first, again = (method(VECTORS, 2, 16, seed=1, balanced=True) for _ in range(2))
    np.testing.assert_array_equal(first.codes, again.codes)
    for column in first.codes.T:
        assert np.bincount(column).max() <= 38  # ceil(600 / 16)


# ---------------------------------------------------------------- refit


def test_refit_of_sums_lowers_the_error() -> None:
    codes, codebooks, _ = residual(VECTORS, 3, 16, seed=0, weights=WEIGHTS)
    refitted = refit(codes, codebooks, VECTORS, WEIGHTS)
    before, after = error(VECTORS, codes, codebooks), error(VECTORS, codes, refitted)
    assert after < 0.98 * before
    # The optimum by least squares over all codebooks at once.
    one_hot = np.concatenate([np.eye(16)[column] for column in codes.T], axis=1)
    root = np.sqrt(WEIGHTS)[:, None]
    solution = np.linalg.lstsq(one_hot * root, VECTORS * root, rcond=None)[0]
    optimum = quantize.distortion(VECTORS, one_hot @ solution, WEIGHTS)
    assert optimum <= after < optimum + 0.5 * (before - optimum)


def test_refit_of_a_product_is_the_mean_and_keeps_unused_codes() -> None:
    codes = RNG.integers(3, size=(600, 2)).astype(np.int32)
    codebooks = tuple(RNG.standard_normal((4, 4)).astype(np.float32) for _ in range(2))
    refitted = refit(codes, codebooks, VECTORS, WEIGHTS)
    rows = codes[:, 1] == 2
    mean = np.average(VECTORS[rows, 4:], axis=0, weights=WEIGHTS[rows])
    np.testing.assert_allclose(refitted[1][2], mean, atol=1e-5)
    np.testing.assert_array_equal(refitted[1][3], codebooks[1][3])
