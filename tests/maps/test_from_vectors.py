"""Maps from vectors: each option does what it says, and errors name the option."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from vqcx_jax.errors import ConfigError, DataError
from vqcx_jax.maps import TokenMap, quantize
from vqcx_jax.maps.from_vectors import Options, map_from_vectors

RNG = np.random.default_rng(0)
VOCAB = 300
# A coarse and a fine part, noise, and norms of different size.
DIRECTIONS = (
    RNG.standard_normal((12, 8))[RNG.integers(12, size=VOCAB)]
    + 0.4 * RNG.standard_normal((10, 8))[RNG.integers(10, size=VOCAB)]
    + 0.05 * RNG.standard_normal((VOCAB, 8))
)
VECTORS = (DIRECTIONS * 1.5 ** RNG.standard_normal((VOCAB, 1))).astype(np.float32)
COUNTS = (1000 / (1 + RNG.permutation(VOCAB))).astype(np.int64)  # Some are 0... 3, with ties.


def make(method: Any = "residual", vectors: np.ndarray = VECTORS, **options: Any) -> TokenMap:
    defaults: dict[str, Any] = {"num_codes": 16, "num_codebooks": 1 if method == "kmeans" else 2}
    return map_from_vectors(vectors, COUNTS, Options(method=method, **{**defaults, **options}), 0)


def approximations(token_map: TokenMap) -> np.ndarray:
    """What a head that starts from the map has as rows of an output layer."""
    assert token_map.codebooks is not None
    rows = quantize.reconstruct(token_map.codes, token_map.codebooks, 8)
    if token_map.scale is not None:
        rows = rows * token_map.scale[:, None]
    if token_map.own_vectors is not None:
        rows[token_map.own_tokens] = token_map.own_vectors
    return rows


def gram_error(token_map: TokenMap) -> float:
    """Error of inner products, which no rotation changes."""
    rows = approximations(token_map)
    wanted = VECTORS @ VECTORS.T
    return float(np.linalg.norm(rows @ rows.T - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("method", "options", "limit"),
    [
        # Codes dealt out at random give 1.2 and more.
        ("kmeans", {}, 0.65),
        ("residual", {}, 0.45),
        ("residual", {"scale": True}, 0.25),
        ("product", {}, 0.6),
        ("product", {"rotate": True}, 0.55),
        ("product", {"rotate": True, "scale": True, "own": 20}, 0.4),
        ("residual", {"scale": True, "own": 50, "unique": True, "balanced": True}, 0.5),
    ],
)
def test_rows_are_near_the_vectors(method: str, options: dict[str, Any], limit: float) -> None:
    token_map = make(method, power=0.0, **options)
    assert token_map.codes.shape == (VOCAB, 1 if method == "kmeans" else 2)
    assert gram_error(token_map) < limit


@pytest.mark.parametrize("scale", [False, True])
def test_distortion_is_that_of_the_map(scale: bool) -> None:
    token_map = make(scale=scale, own=20)
    coded = token_map.coded_tokens()
    weights = np.maximum(COUNTS[coded], 1) ** 0.5
    expected = quantize.distortion(VECTORS[coded], approximations(token_map)[coded], weights)
    assert token_map.provenance["distortion"] == pytest.approx(expected, rel=1e-5)


def test_provenance_has_every_option() -> None:
    provenance = make(own=3, power=0.25).provenance
    assert provenance["seed"] == 0
    assert provenance["options"] == {
        "method": "residual",
        "num_codes": 16,
        "num_codebooks": 2,
        "power": 0.25,
        "scale": False,
        "own": 3,
        "unique": False,
        "balanced": False,
        "rotate": False,
        "classes": 0,
        "frequent": 0,
    }


@pytest.mark.parametrize(("method", "rotate"), [("residual", False), ("product", True)])
def test_own_tokens_are_the_most_frequent_with_their_vectors(method: str, rotate: bool) -> None:
    token_map = make(method, own=10, rotate=rotate)
    own = token_map.own_tokens
    assert own.tolist() == np.lexsort((np.arange(VOCAB), -COUNTS))[:10].tolist()
    assert token_map.own_vectors is not None
    expected = VECTORS[own] @ VECTORS[own].T
    np.testing.assert_allclose(
        token_map.own_vectors @ token_map.own_vectors.T, expected, rtol=1e-4, atol=1e-4
    )
    same = np.allclose(token_map.own_vectors, VECTORS[own], atol=1e-3)
    assert same != rotate  # In the space of the codebooks.
    # They have no part in the quantisation.
    moved = VECTORS.copy()
    moved[own] += 5
    assert token_map.codebooks is not None
    others = make(method, moved, own=10, rotate=rotate)
    np.testing.assert_array_equal(others.codes, token_map.codes)


def test_no_own_tokens_by_default() -> None:
    assert len(make().own_tokens) == 0 and make().own_vectors is None


def test_scale_is_the_norm_and_codes_are_of_directions() -> None:
    vectors = VECTORS.copy()
    vectors[5] = 0
    token_map = make("residual", vectors, scale=True, own=10)
    assert token_map.scale is not None
    coded = token_map.coded_tokens()
    np.testing.assert_allclose(
        token_map.scale[coded], np.linalg.norm(vectors[coded], axis=1), rtol=1e-5
    )
    np.testing.assert_array_equal(token_map.scale[token_map.own_tokens], 1)
    factors = 2.0 ** RNG.integers(-3, 4, size=(VOCAB, 1)).astype(np.float32)
    np.testing.assert_array_equal(
        make("residual", vectors * factors, scale=True, own=10).codes, token_map.codes
    )
    assert make().scale is None


def test_power_moves_error_from_frequent_to_rare_tokens() -> None:
    frequent = COUNTS > 10

    def error(power: float) -> tuple[float, float]:
        losses = np.sum((VECTORS - approximations(make(power=power))) ** 2, axis=1)
        return losses[frequent].mean(), losses[~frequent].mean()

    flat, steep = error(0.0), error(1.0)
    assert steep[0] < 0.9 * flat[0] and steep[1] > 1.2 * flat[1]


def test_unique() -> None:
    shared = make(num_codes=20)
    assert len(np.unique(shared.codes, axis=0)) < VOCAB
    unique = make(num_codes=20, unique=True)
    assert len(np.unique(unique.codes, axis=0)) == VOCAB
    assert unique.provenance["distortion"] < 0.5
    # Of tokens that would share their codes, the most frequent keeps them.
    order = np.lexsort((np.arange(VOCAB), -COUNTS))
    _, first = np.unique(shared.codes[order], axis=0, return_index=True)
    np.testing.assert_array_equal(unique.codes[order][first], shared.codes[order][first])


@pytest.mark.parametrize("method", ["product", "residual"])
def test_codebooks_fit_the_codes_that_tokens_have_in_the_end(method: str) -> None:
    token_map = make(method, num_codes=20, unique=True)
    assert token_map.codebooks is not None
    weights = np.maximum(COUNTS, 1) ** 0.5
    rest = VECTORS - quantize.reconstruct(token_map.codes, token_map.codebooks, 8)
    if method == "product":
        rest = rest[:, 4:]
    # The last codebook is the one that was fitted last: it leaves nothing on average.
    for code in np.unique(token_map.codes[:, 1]):
        rows = token_map.codes[:, 1] == code
        np.testing.assert_allclose(
            np.average(rest[rows], axis=0, weights=weights[rows]), 0, atol=1e-5
        )


def test_unique_counts_the_tokens_that_have_codes() -> None:
    with pytest.raises(DataError, match="^num_codes=17, num_codebooks=2: make 289 tuples, .* 300"):
        make(num_codes=17, unique=True)
    token_map = make(num_codes=17, unique=True, own=20)
    coded = token_map.codes[token_map.coded_tokens()]
    assert len(np.unique(coded, axis=0)) == 280


def test_balanced() -> None:
    token_map = make("kmeans", balanced=True, own=4)
    sizes = np.bincount(token_map.codes[token_map.coded_tokens(), 0])
    assert sizes.max() <= 19  # ceil(296 / 16)
    free = make("kmeans", own=4)
    assert np.bincount(free.codes[free.coded_tokens(), 0]).max() > 19


@pytest.mark.parametrize("scale", [False, True])
def test_classes_are_of_the_less_frequent_tokens(scale: bool) -> None:
    options: dict[str, Any] = {"method": "product", "scale": scale, "rotate": True}
    token_map = make(classes=12, frequent=40, **options)
    assert token_map.classes is not None
    order = np.lexsort((np.arange(VOCAB), -COUNTS))
    np.testing.assert_array_equal(token_map.classes.of_token[order[:40]], -1)
    sizes = np.bincount(token_map.classes.of_token[order[40:]])
    assert len(sizes) == 12 and sizes.min() > 0 and sizes.max() <= 22  # ceil(260 / 12)
    assert token_map.classes.codes.shape == (12, 2)
    assert (token_map.classes.scale is not None) == scale
    assert token_map.provenance["options"]["classes"] == 12
    assert token_map.provenance["options"]["frequent"] == 40
    # Codes are what they would be without.
    plain = make(**options)
    np.testing.assert_array_equal(token_map.codes, plain.codes)
    assert plain.classes is None


def test_frequent_tokens_pull_their_class() -> None:
    """A class has the codes that come nearest to the mean of its tokens, weighted by counts."""
    token_map = make("product", classes=3, power=1.0)
    assert token_map.classes is not None and token_map.codebooks is not None
    rows = approximations(token_map)
    weights = np.maximum(COUNTS, 1)
    for class_, codes in enumerate(token_map.classes.codes):
        members = token_map.classes.of_token == class_
        mean = np.average(rows[members], axis=0, weights=weights[members])
        for code, book, part in zip(codes, token_map.codebooks, np.split(mean, 2), strict=True):
            assert code == np.argmin(np.sum((book - part) ** 2, axis=1))


def test_same_seed_same_map() -> None:
    first, again = make("product", rotate=True), make("product", rotate=True)
    np.testing.assert_array_equal(first.codes, again.codes)
    classes, classes_again = (make("product", classes=9).classes for _ in range(2))
    assert classes is not None and classes_again is not None
    np.testing.assert_array_equal(classes.of_token, classes_again.of_token)
    np.testing.assert_array_equal(classes.codes, classes_again.codes)
    other = map_from_vectors(
        VECTORS, COUNTS, Options(method="product", num_codes=16, num_codebooks=2, rotate=True), 1
    )
    assert not np.array_equal(first.codes, other.codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "kmeans", "num_codebooks": 2}, "num_codebooks=2: must be 1 for method='kmea"),
        ({"method": "residual", "rotate": True}, "rotate=True: needs method='product', not 'res"),
        ({"method": "product", "num_codebooks": 3}, "num_codebooks=3: must divide 8, the width"),
        ({"num_codes": 301}, "num_codes=301: must be at most 300, the 300 tokens without the own"),
        ({"own": 290}, "num_codes=16: must be at most 10, the 300 tokens without the own=290"),
        ({"own": 301}, "num_codes=16: must be at most 0, "),
        ({"classes": 9}, "classes=9: needs method='product', not 'residual'"),
        ({"method": "kmeans", "classes": 9}, "classes=9: needs method='product', not 'kmeans'"),
        ({"method": "product", "classes": 9, "own": 2}, "own=2: must be 0 with classes=9"),
        ({"method": "product", "frequent": 9}, "frequent=9: needs classes of 1 or more"),
        (
            {"method": "product", "classes": 271, "frequent": 30},
            "classes=271: must be at most 270, the 300 tokens without the frequent=30 most",
        ),
        (
            {"method": "product", "classes": 1, "frequent": 301},
            "classes=1: must be at most 0, the 300 tokens without the frequent=301",
        ),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=f"^{message}") as caught:
        make(**options)
    assert "\n" not in str(caught.value)


def test_counts_must_fit() -> None:
    with pytest.raises(DataError, match=r"^counts of shape \(299,\): expected \(300,\)"):
        map_from_vectors(VECTORS, COUNTS[:-1], Options(method="kmeans", num_codes=4), 0)


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options(method="kmeans", num_codes=4).own = 3  # type: ignore[misc]
