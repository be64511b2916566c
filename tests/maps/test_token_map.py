"""A token map checks itself, survives its file, and says what is wrong with another's."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vqcx_jax.errors import DataError
from vqcx_jax.maps import TokenClasses, TokenMap

RNG = np.random.default_rng(0)
CODES = np.stack([np.arange(12) % 3, np.arange(12) % 5], axis=1).astype(np.int32)
CLASSES = TokenClasses(
    of_token=np.asarray([-1, 0, 1, 2, 0, 0, 1, -1, 1, 2, 0, 2], np.int32),
    codes=np.asarray([[0, 4], [2, 0], [1, 3]], np.int32),
    scale=np.asarray([0.5, 2, 1], np.float32),
)
FULL = TokenMap(
    CODES,
    (3, 5),
    codebooks=tuple(RNG.standard_normal((k, 4)).astype(np.float32) for k in (3, 5)),
    scale=RNG.random(12).astype(np.float32),
    own_tokens=np.asarray([7, 2], np.int32),
    own_vectors=RNG.standard_normal((2, 8)).astype(np.float32),
    classes=CLASSES,
    provenance={"tokenizer": "abc", "options": {"power": 0.5}, "note": "été"},
)
NOT_FINITE = np.full(12, np.nan, np.float32)


def test_sizes() -> None:
    assert (FULL.vocab_size, FULL.num_codebooks) == (12, 2)
    np.testing.assert_array_equal(FULL.coded_tokens(), [0, 1, 3, 4, 5, 6, 8, 9, 10, 11])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": (3, 4)}, r"codes of codebook 1: must be in \[0, 4\), got 4"),
        ({"codes": CODES - 1}, r"codes of codebook 0: must be in \[0, 3\), got -1"),
        ({"codes": CODES.astype(np.int64)}, r"codes: must be int32 of shape .*got int64 \(12, 2\)"),
        ({"codes": CODES[:, :1]}, r"codes: must be int32 of shape \(vocab_size, 2\), a column"),
        ({"codes": CODES[:0]}, r"codes of shape \(0, 2\): must have a token"),
        ({"num_codes": (3, 13)}, r"num_codes=\(3, 13\): must be in 1 .. 12"),
        ({"codebooks": (FULL.codebooks or ())[:1]}, "1 codebooks: codes of 2 need as many"),
        ({"codebooks": (FULL.codebooks or ())[::-1]}, r"codebooks: must be float32 \(3, D\), got"),
        ({"scale": np.ones(12)}, r"scale: must be float32 \(12,\), got float64 \(12,\)"),
        ({"scale": np.ones(11, np.float32)}, r"scale: .*got float32 \(11,\)"),
        ({"scale": NOT_FINITE}, "scale: must not contain NaN or infinity"),
        ({"own_tokens": np.asarray([7, 7], np.int32)}, r"own_tokens: must be distinct and in"),
        ({"own_tokens": np.asarray([7, 12], np.int32)}, r"distinct and in \[0, 12\)"),
        ({"own_tokens": np.asarray([-1, 7], np.int32)}, r"distinct and in \[0, 12\)"),
        ({"own_tokens": np.asarray([7, 2])}, "own_tokens: must be int32 of one axis, got int64"),
        ({"own_tokens": np.asarray([3], np.int32)}, r"own_vectors: must be float32 \(1, D\), got"),
    ],
)
def test_fields_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        dataclasses.replace(FULL, **changes)
    assert "\n" not in str(caught.value)


def with_classes(**changes: Any) -> dict[str, Any]:
    return {"classes": dataclasses.replace(CLASSES, **changes)}


def classes_of(*classes: int) -> dict[str, Any]:
    return with_classes(of_token=np.resize(np.asarray(classes, np.int32), 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_classes(of_token=np.arange(12) % 3), r"class_of_token: .* int32 \(12,\), got int64"),
        (with_classes(of_token=CLASSES.of_token[:11]), r"class_of_token: .*got int32 \(11,\)"),
        (classes_of(0, 1, 2, 3), r"class_of_token: must be -1 or in \[0, 3\), and no class"),
        (classes_of(0, 1, 2, -2), r"class_of_token: must be -1 or in \[0, 3\), and no class"),
        (classes_of(0, 2, -1), r"class_of_token: .*and no class without a token"),
        (with_classes(codes=CODES.astype(np.int64)), "class_codes: must be int32 of .*got int64"),
        (with_classes(codes=CODES[:3, :1]), r"class_codes: .*\(num_classes, 2\), .*\(3, 1\)"),
        (with_classes(codes=CODES[:3, 0]), r"class_codes: .*got int32 \(3,\)"),
        (with_classes(codes=CODES[:0]), r"class_codes: .* of a class or more, got int32 \(0, 2\)"),
        (
            with_classes(codes=CODES[2:5, ::-1]),
            r"class_codes: must be in \[0, num_codes=\(3, 5\)\)",
        ),
        (with_classes(codes=CODES[:3] - 1), r"class_codes: must be in \[0, num_codes=\(3, 5\)\)"),
        (with_classes(scale=np.ones(3)), r"class_scale: must be float32 \(3,\), got float64"),
        (with_classes(scale=np.ones(2, np.float32)), r"class_scale: .*got float32 \(2,\)"),
        (with_classes(scale=NOT_FINITE[:3]), "class_scale: must not contain NaN or infinity"),
        (with_classes(scale=None), "class_scale: must be there if scale is, and only then"),
        ({"scale": None}, "class_scale: must be there if scale is, and only then"),
    ],
)
def test_classes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}") as caught:
        dataclasses.replace(FULL, **changes)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- files


def same_classes(first: TokenClasses | None, second: TokenClasses | None) -> bool:
    if first is None or second is None:
        return first is second
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def same(first: TokenMap, second: TokenMap) -> bool:
    a, b = (vars(token_map).copy() for token_map in (first, second))
    books_a, books_b = (x.pop("codebooks") or () for x in (a, b))
    plain = ("num_codes", "provenance")
    return (
        all(a.pop(name) == b.pop(name) for name in plain)
        and same_classes(a.pop("classes"), b.pop("classes"))
        and len(books_a) == len(books_b)
        and all(np.array_equal(x, y) for x, y in zip(books_a, books_b, strict=True))
        and all(np.array_equal(a[name], b[name]) for name in a)
    )


@pytest.mark.parametrize(
    "token_map",
    [
        FULL,
        TokenMap(CODES, (3, 5)),
        TokenMap(CODES, (3, 5), classes=dataclasses.replace(CLASSES, scale=None)),
    ],
    ids=["full", "codes", "classes"],
)
def test_file_holds_everything(tmp_path: Path, token_map: TokenMap) -> None:
    path = tmp_path / "new" / "map.npz"
    token_map.save(path)
    loaded = TokenMap.load(path, vocab_size=12, tokenizer="abc")
    assert same(loaded, token_map)
    assert loaded.codes.dtype == np.int32
    assert not same(loaded, dataclasses.replace(token_map, provenance={}, codes=CODES * 0))
    other = None if token_map.classes else dataclasses.replace(CLASSES, scale=None)
    assert not same(loaded, dataclasses.replace(token_map, scale=None, classes=other))
    assert list(path.parent.iterdir()) == [path]  # Nothing temporary is left.


@pytest.mark.parametrize(("k", "dtype"), [(256, np.uint8), (257, np.uint16), (65_537, np.uint32)])
def test_codes_take_the_smallest_type_that_fits(tmp_path: Path, k: int, dtype: Any) -> None:
    codes = np.arange(70_000, dtype=np.int32)[:, None] % k
    TokenMap(codes, (k,)).save(tmp_path / "map.npz")
    with np.load(tmp_path / "map.npz", allow_pickle=False) as arrays:
        assert arrays["codes"].dtype == dtype
    np.testing.assert_array_equal(TokenMap.load(tmp_path / "map.npz").codes, codes)


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    FULL.save(path)
    with pytest.raises(TypeError, match="JSON"):
        dataclasses.replace(FULL, provenance={"bad": object()}).save(path)
    assert same(TokenMap.load(path), FULL)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="^token map .*cannot be written: "):
        FULL.save(tmp_path / "file" / "map.npz")
    (tmp_path / "directory").mkdir()
    with pytest.raises(DataError, match="^token map .*cannot be written: "):
        FULL.save(tmp_path / "directory")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "file", "map.npz"]


@pytest.mark.parametrize(
    ("needed", "message"),
    [
        ({"vocab_size": 13}, "made for another vocabulary, of 12 tokens; must be of 13"),
        ({"tokenizer": "xyz"}, "made for another vocabulary, of the tokenizer abc; must be of xyz"),
    ],
)
def test_map_of_another_vocabulary(tmp_path: Path, needed: dict[str, Any], message: str) -> None:
    FULL.save(tmp_path / "map.npz")
    with pytest.raises(DataError, match=f"^token map '.*map.npz': {message}$"):
        TokenMap.load(tmp_path / "map.npz", **needed)


def test_map_that_names_no_tokenizer_fits_every_one(tmp_path: Path) -> None:
    TokenMap(CODES, (3, 5)).save(tmp_path / "map.npz")
    assert TokenMap.load(tmp_path / "map.npz", tokenizer="xyz").vocab_size == 12


@pytest.mark.parametrize("content", [None, b"", b"hello", b"PK\x03\x04 zip?", np.ones(3)])
def test_not_an_npz_file(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "map.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with path.open("wb") as file:
            np.save(file, content)
    reason = "no such file" if content is None else "not a readable .npz file"
    with pytest.raises(DataError, match=f"^token map '.*': {reason}$"):
        TokenMap.load(path)


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    FULL.save(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        headers = [
            archive.getinfo(f"{name}.npy").header_offset for name in ("codebook_0", "class_codes")
        ]
    flipped = [flip(whole, header + 200) for header in headers]
    for damaged in (whole[:-1], whole[: len(whole) // 2], *flipped):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a readable .npz file$"):
            TokenMap.load(path)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def arrays_of(tmp_path: Path) -> dict[str, np.ndarray]:
    FULL.save(tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": None}, "has no array 'codes'$"),
        ({"codebook_1": None}, "has no array 'codebook_1'$"),
        ({"class_codes": None}, "has no array 'class_codes'$"),
        ({"class_of_token": None}, "has no array 'class_of_token'$"),
        ({"class_scale": None}, "class_scale: must be there if scale is"),
        ({"class_codes": CODES[:2]}, "class_of_token: must be -1 or in"),
        ({"codes": CODES.astype(np.float32)}, "codes, num_codes: must be uint8.*got float32 and"),
        ({"codes": CODES.astype(np.uint64)}, "codes, num_codes: must be uint8.*got uint64 and"),
        ({"codes": CODES.astype(np.uint32) + 2**31}, r"codes of codebook 0: must be in \[0, 3\)"),
        ({"num_codes": np.asarray(3)}, r"codes, num_codes: .*got uint8 and int64 \(\)"),
        ({"num_codes": np.asarray([2, 5])}, r"codes of codebook 0: must be in \[0, 2\), got 2"),
        ({"provenance": np.asarray("[1]")}, "provenance: must be a JSON object"),
        ({"provenance": np.asarray("{")}, "provenance: must be a JSON object"),
        ({"scale": np.asarray(["a"] * 12)}, "scale: must be float32"),
        ({"scale": np.asarray([{}])}, "not a readable .npz file"),
    ],
)
def test_other_contents(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {**arrays_of(tmp_path), **changes}
    path = tmp_path / "map.npz"
    present = {name: array for name, array in arrays.items() if array is not None}
    np.savez(path, **present)
    with pytest.raises(DataError, match=f"^token map '.*map.npz': {message}") as caught:
        TokenMap.load(path)
    assert "\n" not in str(caught.value)
