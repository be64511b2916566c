"""WikiText-2 and WikiText-103: white-space tokens, one article a document.

The text of a document is the article's raw lines without the newline that ends the last one:
that newline is the end of the document. So the word tokenizer, for which a newline is the token
<eos>, gives exactly the token stream that results on WikiText are quoted for.
"""

import json
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

from vqcx_jax.config import schema
from vqcx_jax.data.corpora.base import Document, Recipe, fingerprint
from vqcx_jax.data.corpora.download import Archive, fetch
from vqcx_jax.errors import DataError

_ARCHIVES = {
    "wikitext2": Archive(
        url="https://wikitext.smerity.com/wikitext-2-v1.zip",
        sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
    ),
    "wikitext103": Archive(
        url="https://wikitext.smerity.com/wikitext-103-v1.zip",
        sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    ),
}
_NAMES = {"train": ("train",), "validation": ("valid", "validation"), "test": ("test",)}
_PATTERNS = ("wiki.{}.tokens", "{}.tokens", "{}.txt", "{}.jsonl")


def recipe(dataset: schema.WikiText, downloads: Path) -> Recipe:
    """Returns the three splits, from the user's directory or downloaded into `downloads`.

    Raises:
        DataError: a file is missing, or the archive cannot be downloaded.
    """
    if dataset.path is None:
        directory = fetch(_ARCHIVES[dataset.kind], downloads / dataset.kind)
    else:
        directory = Path(dataset.path).expanduser()
    files = {split: _find(directory, split) for split in _NAMES}
    return Recipe(
        name=dataset.kind,
        fingerprint=fingerprint({"documents": "articles"}, files.items()),
        splits={split: partial(_documents, path) for split, path in files.items()},
    )


def split_articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Splits lines (without their newlines) into (title, text) at " = Title = " headings.

    A heading of level 1 stands between blank lines; the blank line above it is the article's
    first. Whatever precedes the first heading belongs to the first article, so that no line is
    lost: joining the texts with newlines gives the lines back.
    """
    title = ""
    article: list[str] = []
    for line, after in pairwise(chain(lines, [""])):
        above_is_blank = not article or not article[-1].strip()
        if _is_title(line) and above_is_blank and not after.strip():
            if title:
                above = article.pop()
                yield title, "\n".join(article)
                article = [above]
            title = line.strip()[2:-2]
        article.append(line)
    if article:
        yield title, "\n".join(article)


def _is_title(line: str) -> bool:
    heading = line.strip()
    return heading[:2] == "= " and heading[-2:] == " =" and heading[2:3] not in ("", "=")


def _find(directory: Path, split: str) -> Path:
    names = [pattern.format(name) for name in _NAMES[split] for pattern in _PATTERNS]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise DataError(
        f"data.dataset.path={str(directory)!r} has no {split} file; accepted: {', '.join(names)}"
    )


def _documents(path: Path) -> Iterator[Document]:
    try:
        for title, text in split_articles(_lines(path)):
            yield Document(text=text, name=title or path.name)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})") from None


def _lines(path: Path) -> Iterator[str]:
    """Yields the lines of a text file, or the "text" of a JSON lines file whose rows are lines."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if path.suffix == ".jsonl":
                try:
                    line = json.loads(line)["text"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    raise DataError(
                        f"{path} line {number}: accepted: a JSON object with the field 'text'"
                    ) from None
            yield from line.removesuffix("\n").split("\n")
