"""The user's own text: .txt files (one document each) and .jsonl files (one document a line)."""

import functools
import glob
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from vqcx_jax.config import schema
from vqcx_jax.data.corpora.base import Document, Recipe, fingerprint, hash_fraction, is_blank
from vqcx_jax.errors import DataError

_SUFFIXES = (".txt", ".jsonl")
_NamedFiles = list[tuple[str, Path]]
_Splits = dict[str, Callable[[], Iterator[Document]]]


def recipe(dataset: schema.TextFiles) -> Recipe:
    """Returns the files' documents: a train and a validation split.

    Held-out documents are chosen by a hash of their text, so that equal documents stay together.

    Raises:
        DataError: a path matches no .txt or .jsonl file.
    """
    files = _files(dataset.path, "data.dataset.path")
    documents = functools.partial(read_documents, files, dataset.text_field)
    options: dict[str, str | int | float] = {
        "text_field": dataset.text_field,
        "train_files": len(files),
    }
    if dataset.validation_path is not None:
        validation = _files(dataset.validation_path, "data.dataset.validation_path")
        files = files + validation
        splits: _Splits = {
            "train": documents,
            "validation": functools.partial(read_documents, validation, dataset.text_field),
        }
    else:
        options["validation_fraction"] = dataset.validation_fraction
        held_out = functools.cache(lambda: _last_held_out(documents(), dataset))
        splits = {
            "train": lambda: (d for d in documents() if hash_fraction(d["text"]) > held_out()),
            "validation": lambda: (
                d for d in documents() if hash_fraction(d["text"]) <= held_out()
            ),
        }
    return Recipe("text_files", fingerprint(options, files), splits)


def whole_recipe(path: str, text_field: str) -> Recipe:
    """Returns the documents of a file, directory or glob as one split, "whole".

    Raises:
        DataError: the path matches no .txt or .jsonl file.
    """
    files = _files(path, "text")
    documents = functools.partial(read_documents, files, text_field)
    return Recipe(
        "text_files", fingerprint({"text_field": text_field}, files), {"whole": documents}
    )


def read_documents(files: _NamedFiles, text_field: str) -> Iterator[Document]:
    """Yields the documents of named .txt and .jsonl files.

    Raises:
        DataError: a file is not UTF-8, or a line is not a JSON object with a string `text_field`.
    """
    for name, path in files:
        if path.suffix == ".jsonl":
            yield from _jsonl_documents(name, path, text_field)
        else:
            yield Document(text=_decode(path.read_bytes(), str(path)), name=name)


def _files(path: str, option: str) -> _NamedFiles:
    """Returns the sorted files of a file, directory or glob, with names free of the place."""
    pattern = os.path.expanduser(path)
    if os.path.isdir(pattern):
        found = [match for suffix in _SUFFIXES for match in Path(pattern).rglob(f"*{suffix}")]
    elif os.path.exists(pattern):
        found = [Path(pattern)]
    else:
        found = [Path(match) for match in glob.glob(pattern, recursive=True)]
    paths = sorted(match for match in found if match.suffix in _SUFFIXES and match.is_file())
    if not paths:
        raise DataError(
            f"{option}={path!r}: no such text; accepted: a .txt or .jsonl file, "
            "a directory that has some, or a glob that matches some"
        )
    root = os.path.commonpath([file.parent for file in paths])
    return [(Path(os.path.relpath(file, root)).as_posix(), file) for file in paths]


def _jsonl_documents(name: str, path: Path, text_field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            text = _decode(line, where)
            if text.isspace():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: invalid JSON ({error.msg})") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: {type(record).__name__}; accepted: a JSON object")
            if not isinstance(record.get(text_field), str):
                raise DataError(
                    f"{where}: no string field data.dataset.text_field={text_field!r}; "
                    f"fields present: {', '.join(record) or 'none'}"
                )
            yield Document(text=record[text_field], name=f"{name}:{number}")


def _last_held_out(documents: Iterator[Document], dataset: schema.TextFiles) -> float:
    """Returns the hash of the last held-out document; at least one is on either side of it."""
    hashes = sorted({hash_fraction(d["text"]) for d in documents if not is_blank(d)})
    if len(hashes) < 2:
        raise DataError(
            f"data.dataset.path={dataset.path!r} has {len(hashes)} different documents, too few "
            f"for validation_fraction={dataset.validation_fraction}; accepted: two or more, "
            "or a validation_path"
        )
    count = sum(value < dataset.validation_fraction for value in hashes)
    return hashes[min(max(count, 1), len(hashes) - 1) - 1]


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from None
