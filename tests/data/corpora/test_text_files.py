import json
import shutil

import pytest

from vqcx_jax.config import schema
from vqcx_jax.data.corpora import open_corpus
from vqcx_jax.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text" / "deep").mkdir(parents=True)
    (tmp_path / "other.txt").write_text("other")
    return tmp_path / "text"


def _open(tmp_path, **options):
    """Opens text; unless a fraction is given, nothing is held out of `path`."""
    if "validation_fraction" not in options:
        options.setdefault("validation_path", str(tmp_path / "other.txt"))
    return open_corpus(schema.TextFiles(**options), tmp_path / "cache")


def _documents(corpus, split="train"):
    return {d["name"]: d["text"] for d in corpus.split(split)}


def _write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def test_directory_is_searched_for_both_kinds(tmp_path, folder):
    (folder / "a.txt").write_bytes("é\r\nb\n".encode())
    (folder / "notes.md").write_text("not this")
    _write_jsonl(folder / "deep" / "b.jsonl", ["one", "two\u2028lines"])
    corpus = _open(tmp_path, path=str(folder))
    assert _documents(corpus) == {
        "a.txt": "é\r\nb\n",
        "deep/b.jsonl:1": "one",
        "deep/b.jsonl:2": "two\u2028lines",
    }
    assert _documents(corpus, "validation") == {"other.txt": "other"}


def test_glob_and_single_file(tmp_path, folder):
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(name)
    assert len(_open(tmp_path, path=str(folder / "*.txt")).split("train")) == 2
    corpus = _open(tmp_path, path=str(folder / "a.txt"))
    assert _documents(corpus) == {"a.txt": "a"}


def test_fraction_is_held_out_and_no_document_is_in_both(tmp_path, folder):
    _write_jsonl(folder / "a.jsonl", [f"text {i}" for i in range(400)] * 2)
    corpus = _open(tmp_path, path=str(folder), validation_fraction=0.25)
    train, validation = (_documents(corpus, split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 800
    assert not set(train.values()) & set(validation.values())
    assert 0.15 < len(validation) / 800 < 0.35


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_each_split_has_a_document(tmp_path, folder, fraction):
    _write_jsonl(folder / "a.jsonl", ["one", "two", " "])
    corpus = _open(tmp_path, path=str(folder), validation_fraction=fraction)
    assert len(corpus.split("train")) == len(corpus.split("validation")) == 1


def test_one_document_cannot_be_split(tmp_path, folder):
    (folder / "a.txt").write_text("all")
    with pytest.raises(DataError, match="has 1 different documents.*a validation_path"):
        _open(tmp_path, path=str(folder), validation_fraction=0.05)


def test_validation_path_holds_nothing_out(tmp_path, folder):
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.txt").write_text("b")
    corpus = _open(
        tmp_path, path=str(folder / "a.txt"), validation_path=str(folder / "deep" / "b.txt")
    )
    assert _documents(corpus) == {"a.txt": "a"}
    assert _documents(corpus, "validation") == {"b.txt": "b"}


def test_fingerprint_follows_the_text_not_the_place(tmp_path, folder):
    (folder / "a.txt").write_text("a")
    first = _open(tmp_path, path=str(folder)).fingerprint
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert _open(tmp_path, path=str(moved)).fingerprint == first
    (moved / "a.txt").write_text("b")
    changed = _open(tmp_path, path=str(moved))
    assert changed.fingerprint != first
    assert _documents(changed) == {"a.txt": "b"}


@pytest.mark.parametrize("path", ["", "missing.txt", "*.txt", "deep", "a.md"])
def test_path_without_text_is_an_error(tmp_path, folder, monkeypatch, path):
    monkeypatch.chdir(folder)
    (folder / "a.md").write_text("a")
    with pytest.raises(DataError, match=r"data\.dataset\.path='.*accepted: a \.txt or \.jsonl"):
        _open(tmp_path, path=path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"a\.jsonl line 2: invalid JSON"),
        (b"[1]", r"a\.jsonl line 2: list; accepted: a JSON object"),
        (b'{"body": "x", "id": 1}', r"line 2: .*'text'; fields present: body, id"),
        (b'{"text": 7}', r"line 2: no string field data\.dataset\.text_field='text'"),
        (b'{"text": "\xff"}', r"a\.jsonl line 2: not UTF-8 at byte 10"),
    ],
)
def test_bad_line_is_named(tmp_path, folder, line, message):
    (folder / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        _open(tmp_path, path=str(folder))


def test_text_file_that_is_not_utf8_is_named(tmp_path, folder):
    (folder / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 2"):
        _open(tmp_path, path=str(folder))
