"""What a corpus is: named splits, each a random-access sequence of documents."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from vqcx_jax.errors import DataError


class Document(TypedDict):
    """A text, and the name that error messages call it by."""

    text: str
    name: str


class Source(Protocol):
    """Random access to documents, as `grain.MapDataset.source` wants it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


@dataclass(frozen=True)
class Corpus:
    """The documents of a dataset.

    Attributes:
        name: what messages call it.
        fingerprint: identity of the text and of how it is split; the same on every machine.
        splits: the sources by split name, some of "train", "validation" and "test".
    """

    name: str
    fingerprint: str
    splits: Mapping[str, Source]

    def record(self) -> dict[str, str]:
        """What checkpoints and token maps say of the text."""
        return {"name": self.name, "fingerprint": self.fingerprint}

    def split(self, name: str) -> Source:
        """Returns the documents of a split.

        Raises:
            DataError: the corpus has no such split.
        """
        if name not in self.splits:
            raise DataError(
                f"split={name!r}: {self.name} has none; accepted: {', '.join(self.splits)}"
            )
        return self.splits[name]


@dataclass(frozen=True)
class Recipe:
    """A corpus before preparation: each split is a function that generates its documents."""

    name: str
    fingerprint: str
    splits: Mapping[str, Callable[[], Iterator[Document]]]


class Records:
    """The documents of a TFDS data source whose examples are dicts of byte strings.

    Args:
        records: the data source.
        split: the split's name, for documents without one of their own.
        text_field: the feature that holds the text.
        name_field: the feature that holds the name. None: names are "train[0]", "train[1]" ...
    """

    def __init__(
        self, records: Any, split: str, text_field: str = "text", name_field: str | None = None
    ) -> None:
        self._records = records
        self._split = split
        self._text_field = text_field
        self._name_field = name_field

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        record = self._records[index]
        name = f"{self._split}[{index}]"
        if self._name_field is not None:
            name = _decode(record[self._name_field], name)
        return Document(text=_decode(record[self._text_field], name), name=name)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Records({self._split!r}, {len(self)} documents)"


def is_blank(document: Document) -> bool:
    """Says whether a document has nothing but white space; such documents are never scored."""
    return not document["text"] or document["text"].isspace()


def hash_fraction(text: str) -> float:
    """Maps a text to a number in [0, 1) that looks random and never changes."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def fingerprint(options: Mapping[str, Any], files: Iterable[tuple[str, Path]]) -> str:
    """Returns an identity of the contents of named files, read under some options."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for name, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(json.dumps([name, content]).encode())
    return digest.hexdigest()[:16]


def _decode(value: str | bytes, name: str) -> str:
    try:
        return value if isinstance(value, str) else value.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"document {name}: not UTF-8 at byte {error.start}") from None
