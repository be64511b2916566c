"""Vectors made with fewer dimensions than the model has: the wide ones must say the same."""

import dataclasses

import numpy as np
import pytest

from vqcx_jax.maps import TokenMap, quantize
from vqcx_jax.maps.from_vectors import Options, map_from_vectors
from vqcx_jax.maps.widths import rank_for, widen, widen_map

VECTORS = np.random.default_rng(0).standard_normal((60, 12)).astype(np.float32)
COUNTS = np.arange(60)


@pytest.mark.parametrize(
    ("width", "num_slices", "rank"),
    [
        (1, 1, 1),
        (240, 16, 240),
        (512, 16, 512),
        (513, 1, 512),
        (4096, 16, 512),
        (768, 12, 504),
        (4096, 1024, 1024),
    ],
)
def test_rank(width: int, num_slices: int, rank: int) -> None:
    """Up to 512 nothing changes; beyond, slices must stay of equal width and not become empty."""
    assert rank_for(width, num_slices) == rank
    assert rank % num_slices == width % num_slices == 0


@pytest.mark.parametrize("num_slices", [1, 3, 12])
def test_inner_products_of_slices_stay(num_slices: int) -> None:
    wide = widen(VECTORS, 48, num_slices)
    assert wide.shape == (60, 48) and wide.dtype == np.float32
    pairs = zip(
        np.split(VECTORS, num_slices, axis=1), np.split(wide, num_slices, axis=1), strict=True
    )
    for narrow, widened in pairs:
        np.testing.assert_allclose(widened @ widened.T, narrow @ narrow.T, atol=1e-5)
    # No column of the model starts without a gradient.
    assert np.all(np.any(wide, axis=0))
    np.testing.assert_array_equal(wide, widen(VECTORS, 48, num_slices))


def test_same_width_is_left_as_it_is() -> None:
    assert widen(VECTORS, 12, 3) is VECTORS
    token_map = made(method="product", num_codebooks=3)
    assert widen_map(token_map, 12, 3) is token_map


def made(**options: object) -> TokenMap:
    return map_from_vectors(VECTORS, COUNTS, Options(num_codes=8, **options), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "num_slices"),
    [
        ({"method": "product", "num_codebooks": 3, "scale": True, "classes": 5}, 3),
        ({"method": "product", "num_codebooks": 3, "own": 4}, 3),
        ({"method": "residual", "num_codebooks": 2, "own": 4}, 1),
        ({"method": "kmeans"}, 1),
    ],
)
def test_map_stands_for_the_widened_vectors(options: dict[str, object], num_slices: int) -> None:
    narrow = made(**options)
    wide = widen_map(narrow, 48, num_slices)
    assert narrow.codebooks is not None and wide.codebooks is not None
    expected = widen(quantize.reconstruct(narrow.codes, narrow.codebooks, 12), 48, num_slices)
    found = quantize.reconstruct(wide.codes, wide.codebooks, 48)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if narrow.own_vectors is not None:
        assert wide.own_vectors is not None
        own = widen(narrow.own_vectors, 48, num_slices)
        np.testing.assert_array_equal(wide.own_vectors, own)
    kept = {"codebooks": None, "own_vectors": None}
    for name, array in dataclasses.replace(narrow, **kept).to_arrays().items():  # type: ignore[arg-type]
        np.testing.assert_array_equal(wide.to_arrays()[name], array)
