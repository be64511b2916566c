"""From a head's config to its map, and what a user reads about a map that does not fit."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqcx_jax.config.schema import ClassVQHead, VQHead
from vqcx_jax.errors import DataError
from vqcx_jax.maps import TokenClasses, TokenMap, make_map
from vqcx_jax.maps.classes import random_classes
from vqcx_jax.maps.fixed import contiguous_map, frequency_map, random_map
from vqcx_jax.maps.from_vectors import Options, map_from_vectors
from vqcx_jax.maps.vectors import cooccurrence_vectors

COUNTS = np.asarray([5, 0, 9, 1, 7, 3, 3, 0, 2, 8, 4, 6])


def make(head: VQHead | ClassVQHead, **changes: Any) -> TokenMap:
    options: dict[str, Any] = {
        "vocab_size": 12,
        "embed_dim": 8,
        "counts": COUNTS,
        "seed": 7,
        "tokenizer": "abc",
    }
    return make_map(head, **{**options, **changes})


def test_each_kind() -> None:
    for head, expected in (
        (VQHead(num_codes=3, assignment="random"), random_map(12, 3, seed=7)),
        (VQHead(num_codes=3, num_codebooks=2, assignment="random"), random_map(12, 3, 7, 2)),
        (VQHead(num_codes=3, assignment="contiguous"), contiguous_map(12, 3)),
        (VQHead(num_codes=3, assignment="frequency"), frequency_map(COUNTS, 3)),
    ):
        token_map = make(head)
        np.testing.assert_array_equal(token_map.codes, expected)
        assert token_map.num_codes == (3,) * head.num_codebooks
        assert token_map.codebooks is None and len(token_map.own_tokens) == 0


@pytest.mark.parametrize("assignment", ["random", "contiguous", "frequency"])
def test_own_tokens_are_the_most_frequent_and_the_rest_shares_the_codes(assignment: Any) -> None:
    token_map = make(VQHead(num_codes=3, assignment=assignment, num_own_tokens=3))
    assert token_map.own_tokens.tolist() == [2, 9, 4]
    assert token_map.own_tokens.dtype == np.int32
    rest = [0, 1, 3, 5, 6, 7, 8, 10, 11]
    expected = {
        "random": random_map(9, 3, seed=7),
        "contiguous": contiguous_map(9, 3),
        "frequency": frequency_map(COUNTS[rest], 3),
    }[assignment]
    np.testing.assert_array_equal(token_map.codes[rest], expected)


def test_random_classes() -> None:
    codes: dict[str, Any] = {"num_codes": 3, "num_codebooks": 2}
    head = ClassVQHead(assignment="random", code_init="random", **codes)
    # A third of 12 tokens is frequent, and as many classes share the rest.
    fewer = dataclasses.replace(head, num_classes=2, num_frequent=0)
    for head_of_sizes, sizes in ((head, (4, 4)), (fewer, (2, 0))):
        token_map = make(head_of_sizes)
        np.testing.assert_array_equal(token_map.codes, random_map(12, 3, 7, 2))
        expected = random_classes(COUNTS, *sizes, **codes, seed=7)
        assert token_map.classes is not None
        np.testing.assert_array_equal(token_map.classes.of_token, expected.of_token)
        np.testing.assert_array_equal(token_map.classes.codes, expected.codes)
        assert token_map.codebooks is token_map.classes.scale is None
        assert np.sum(token_map.classes.of_token < 0) == sizes[1]


def test_counts_must_fit() -> None:
    with pytest.raises(DataError, match=r"^counts of shape \(11,\): .*\(12,\)$"):
        make(VQHead(num_codes=3), counts=COUNTS[:-1])


# ---------------------------------------------------------------- files

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


ADDITIVE = TokenMap(
    random_map(12, 3, 0, 2),
    (3, 3),
    codebooks=(floats(3, 8), floats(3, 8)),
    scale=floats(12),
    own_tokens=np.asarray([4], np.int32),
    own_vectors=floats(1, 8),
    provenance={"tokenizer": "abc"},
)
PRODUCT = dataclasses.replace(ADDITIVE, codebooks=(floats(3, 4), floats(3, 4)))


IN_CLASSES = dataclasses.replace(
    PRODUCT,
    own_tokens=np.zeros(0, np.int32),
    own_vectors=None,
    classes=TokenClasses(
        np.asarray([0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, 0], np.int32),
        random_map(3, 3, 1, 2),
        floats(3),
    ),
)


def from_file(tmp_path: Path, token_map: TokenMap, **fields: Any) -> TokenMap:
    path = tmp_path / "map.npz"
    token_map.save(path)
    defaults: dict[str, Any] = {
        "num_codes": 3,
        "num_codebooks": 2,
        "num_own_tokens": 1,
        "token_scale": True,
        "assignment": "file",
        "token_map": str(path),
    }
    return make(VQHead(**{**defaults, **fields}))


def test_codes_of_a_file(tmp_path: Path) -> None:
    token_map = from_file(tmp_path, ADDITIVE)
    np.testing.assert_array_equal(token_map.codes, ADDITIVE.codes)
    np.testing.assert_array_equal(token_map.own_tokens, [4])
    assert token_map.codebooks is token_map.scale is token_map.own_vectors is None
    assert token_map.provenance == {"tokenizer": "abc"}


@pytest.mark.parametrize(("form", "saved"), [("additive", ADDITIVE), ("product", PRODUCT)])
def test_start_from_a_file(tmp_path: Path, form: str, saved: TokenMap) -> None:
    token_map = from_file(tmp_path, saved, form=form, code_init="centroids")
    assert token_map.codebooks is not None and saved.codebooks is not None
    np.testing.assert_array_equal(token_map.codebooks, saved.codebooks)
    np.testing.assert_array_equal(token_map.scale, saved.scale)
    np.testing.assert_array_equal(token_map.own_vectors, saved.own_vectors)


def without(**fields: None) -> TokenMap:
    return dataclasses.replace(ADDITIVE, **fields)


@pytest.mark.parametrize(
    ("token_map", "fields", "message"),
    [
        (ADDITIVE, {"num_codes": 4}, "model.head.num_codes=4: the map '.*map.npz' has 3"),
        (ADDITIVE, {"num_codebooks": 1}, "model.head.num_codebooks=1: the map '.*' has 2"),
        (ADDITIVE, {"num_own_tokens": 0}, "model.head.num_own_tokens=0: the map '.*' has 1"),
        (
            dataclasses.replace(ADDITIVE, num_codes=(3, 4), codebooks=None),
            {},
            r"model.head.num_codes=3: the map '.*' has \(3, 4\)",
        ),
        (
            dataclasses.replace(ADDITIVE, provenance={"tokenizer": "xyz"}),
            {},
            "token map '.*': made for another vocabulary, of the tokenizer xyz; must be of abc",
        ),
        (without(codebooks=None), {"code_init": "centroids"}, ".*map.npz' has no codebooks"),
        (
            ADDITIVE,
            {"code_init": "centroids", "token_scale": False},
            ".*has a scale per token, which needs model.head.token_scale",
        ),
        (
            PRODUCT,
            {"code_init": "centroids"},
            ".*code vectors of width 4; model.head.form='additive' needs 8",
        ),
        (
            ADDITIVE,
            {"code_init": "centroids", "form": "product"},
            ".*code vectors of width 8; model.head.form='product' needs 4",
        ),
        (
            dataclasses.replace(ADDITIVE, own_vectors=floats(1, 4)),
            {"code_init": "centroids"},
            ".*own vectors of width 4; must be model.embed_dim=8",
        ),
    ],
)
def test_map_that_does_not_fit(
    tmp_path: Path, token_map: TokenMap, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"^{message}") as caught:
        from_file(tmp_path, token_map, **fields)
    assert "\n" not in str(caught.value)


def test_map_of_another_vocabulary(tmp_path: Path) -> None:
    ADDITIVE.save(tmp_path / "map.npz")
    head = VQHead(
        num_codes=3, num_codebooks=2, assignment="file", token_map=str(tmp_path / "map.npz")
    )
    with pytest.raises(DataError, match="another vocabulary, of 12 tokens; must be of 13$"):
        make(head, vocab_size=13)


def classes_from_file(tmp_path: Path, token_map: TokenMap, **fields: Any) -> TokenMap:
    path = tmp_path / "map.npz"
    token_map.save(path)
    sizes = {"num_codes": 3, "num_codebooks": 2, "num_classes": 3, "num_frequent": 2}
    return make(ClassVQHead(assignment="file", token_map=str(path), **(sizes | fields)))


def test_classes_of_a_file(tmp_path: Path) -> None:
    classes = IN_CLASSES.classes
    assert classes is not None
    started = classes_from_file(tmp_path, IN_CLASSES)
    only_codes = classes_from_file(tmp_path, IN_CLASSES, code_init="random")
    for made in (started, only_codes):
        np.testing.assert_array_equal(made.codes, IN_CLASSES.codes)
        assert made.classes is not None
        np.testing.assert_array_equal(made.classes.of_token, classes.of_token)
        np.testing.assert_array_equal(made.classes.codes, classes.codes)
    assert started.codebooks is not None and IN_CLASSES.codebooks is not None
    np.testing.assert_array_equal(np.stack(started.codebooks), np.stack(IN_CLASSES.codebooks))
    np.testing.assert_array_equal(started.scale, IN_CLASSES.scale)
    assert started.classes is not None and only_codes.classes is not None
    np.testing.assert_array_equal(started.classes.scale, classes.scale)
    assert only_codes.codebooks is only_codes.scale is only_codes.classes.scale is None


def test_head_without_classes_leaves_those_of_a_file(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_own_tokens": 0, "form": "product", "code_init": "centroids"}
    token_map = from_file(tmp_path, IN_CLASSES, **options)
    assert token_map.classes is None
    np.testing.assert_array_equal(token_map.scale, IN_CLASSES.scale)


def with_classes(*of_token: int) -> TokenMap:
    assert IN_CLASSES.classes is not None
    classes = dataclasses.replace(IN_CLASSES.classes, of_token=np.asarray(of_token, np.int32))
    return dataclasses.replace(IN_CLASSES, classes=classes)


@pytest.mark.parametrize(
    ("token_map", "fields", "message"),
    [
        (IN_CLASSES, {"num_classes": 4}, "model.head.num_classes=4: the map '.*map.npz' has 3"),
        (IN_CLASSES, {"num_classes": None}, "model.head.num_classes=4: the map '.*' has 3"),
        (IN_CLASSES, {"num_frequent": 1}, "model.head.num_frequent=1: the map '.*' has 2"),
        (IN_CLASSES, {"num_frequent": None}, "model.head.num_frequent=4: the map '.*' has 2"),
        (IN_CLASSES, {"num_codes": 4}, "model.head.num_codes=4: the map '.*' has 3"),
        (
            dataclasses.replace(IN_CLASSES, classes=None),
            {},
            "model.head.num_classes=3: the map '.*' has no classes",
        ),
        (
            with_classes(0, 1, 2, -1, 0, 1, 2, -1, 0, 0, 0, 0),
            {},
            "model.head.num_classes=3: the map '.*' has one of 6 tokens; must be at most 4",
        ),
        (
            IN_CLASSES,
            {"token_scale": False},
            "model.head.code_init='centroids': .*has a scale per token, which needs",
        ),
        (PRODUCT, {}, "model.head.num_own_tokens=0: the map '.*' has 1"),
    ],
)
def test_classes_that_do_not_fit(
    tmp_path: Path, token_map: TokenMap, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"^{message}") as caught:
        classes_from_file(tmp_path, token_map, **fields)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- from the text


TEXT = np.random.default_rng(0).integers(40, size=3000).astype(np.int32)


def cooccurrence(
    cached_at: Path | None = None, documents: Any = None, kind: Any = VQHead, **options: Any
) -> TokenMap:
    head = kind(assignment="cooccurrence", num_codes=8, **options)
    return make_map(
        head,
        vocab_size=40,
        embed_dim=12,
        counts=np.bincount(TEXT, minlength=40),
        seed=3,
        documents=documents
        if documents is not None
        else (lambda: iter([TEXT[:1000], TEXT[1000:]])),
        cached_at=cached_at,
    )


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "kmeans"),
        ({"num_codebooks": 2, "num_own_tokens": 5}, "residual"),
        ({"num_codebooks": 3, "form": "product", "token_scale": True}, "product"),
    ],
)
def test_map_of_the_text_has_the_form_of_the_head(options: dict[str, Any], method: str) -> None:
    made = cooccurrence(code_init="centroids", **options)
    expected = map_from_vectors(
        cooccurrence_vectors([TEXT[:1000], TEXT[1000:]], 40, 12),
        np.bincount(TEXT, minlength=40),
        Options(
            method=method,  # type: ignore[arg-type]
            num_codes=8,
            num_codebooks=options.get("num_codebooks", 1),
            scale=options.get("token_scale", False),
            own=options.get("num_own_tokens", 0),
        ),
        seed=0,
    )
    np.testing.assert_array_equal(made.codes, expected.codes)
    assert made.codebooks is not None and expected.codebooks is not None
    np.testing.assert_array_equal(np.stack(made.codebooks), np.stack(expected.codebooks))
    assert cooccurrence(**options).codebooks is None  # code_init="random"


def test_map_of_the_text_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "maps" / "map.npz"
    first = cooccurrence(path, code_init="centroids")
    second = cooccurrence(path, documents=[], code_init="centroids")
    np.testing.assert_array_equal(first.codes, second.codes)
    assert second.codebooks is not None and cooccurrence(path).codebooks is None


def test_damaged_map_of_the_text_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    path.write_bytes(b"half a file")
    made = cooccurrence(path)
    np.testing.assert_array_equal(TokenMap.load(path).codes, made.codes)


def test_map_of_the_text_that_was_made_in_another_way_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    options = Options(method="product", num_codes=8, num_codebooks=3, power=0.25)
    counts = np.bincount(TEXT, minlength=40)
    map_from_vectors(
        np.random.default_rng(1).standard_normal((40, 12)), counts, options, seed=0
    ).save(path)
    head: dict[str, Any] = {"num_codebooks": 3, "form": "product", "code_init": "centroids"}
    made = cooccurrence(path, **head)
    assert made.provenance["options"]["power"] == 0.5
    np.testing.assert_array_equal(made.codes, cooccurrence(**head).codes)
    np.testing.assert_array_equal(TokenMap.load(path).codes, made.codes)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_classes_of_the_text(tmp_path: Path, num_codebooks: int, scale: bool) -> None:
    """Also with one codebook: classes need codes of form="product"."""
    path = tmp_path / "map.npz"
    head: dict[str, Any] = {
        "kind": ClassVQHead,
        "num_codebooks": num_codebooks,
        "num_classes": 5,
        "num_frequent": 6,
        "token_scale": scale,
    }
    made, kept = cooccurrence(path, **head), cooccurrence(path, documents=[], **head)
    options = Options(
        method="product",
        num_codes=8,
        num_codebooks=num_codebooks,
        scale=scale,
        classes=5,
        frequent=6,
    )
    counts = np.bincount(TEXT, minlength=40)
    vectors = cooccurrence_vectors([TEXT[:1000], TEXT[1000:]], 40, 12)
    expected = map_from_vectors(vectors, counts, options, seed=0)
    for found in (made, kept):
        np.testing.assert_array_equal(found.codes, expected.codes)
        assert found.classes is not None and expected.classes is not None
        for name in ("of_token", "codes", "scale"):
            np.testing.assert_array_equal(
                getattr(found.classes, name), getattr(expected.classes, name)
            )
        assert np.sum(found.classes.of_token < 0) == 6
    # What is kept serves a start without centroids too.
    only_codes = cooccurrence(path, documents=[], code_init="random", **head)
    assert only_codes.classes is not None and expected.classes is not None
    np.testing.assert_array_equal(only_codes.classes.codes, expected.classes.codes)
    assert only_codes.codebooks is only_codes.scale is only_codes.classes.scale is None
