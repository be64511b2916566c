"""Puts a corpus of code and prose together: python benchmarks/campaigns/mixed_corpus.py --help.

One JSON line per document, for `data.dataset.kind=text_files`: the standard library of the running
Python, WikiText-2 articles (word-level text as it is), C4 and TinyStories documents. Every
document longer than --max_chars is cut into pieces, so that held-out documents are a fair sample.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from vqcx_jax.data.corpora import python_stdlib
from vqcx_jax.data.corpora.wikitext import split_articles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path, required=True, help="directory with train.txt")
    parser.add_argument("--c4", type=Path, required=True, help="JSON lines with a field text")
    parser.add_argument("--tinystories", type=Path, required=True, help="one text file")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to write")
    parser.add_argument("--max_chars", type=int, default=20_000)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    count = size = 0
    with args.output.open("w", encoding="utf-8") as file:
        for text in _documents(args):
            for start in range(0, len(text), args.max_chars):
                piece = text[start : start + args.max_chars]
                file.write(json.dumps({"text": piece}) + "\n")
                count, size = count + 1, size + len(piece)
    print(f"{count:,} documents, {size:,} characters")


def _documents(args: argparse.Namespace) -> Iterator[str]:
    for documents in python_stdlib.recipe().splits.values():
        yield from (document["text"] for document in documents())
    with (args.wikitext / "train.txt").open(encoding="utf-8") as file:
        yield from (text for _, text in split_articles(line.rstrip("\n") for line in file))
    with args.c4.open(encoding="utf-8") as file:
        yield from (json.loads(line)["text"] for line in file)
    text = args.tinystories.read_text(encoding="utf-8", errors="ignore")
    yield from (story.strip() for story in text.split("<|endoftext|>"))


if __name__ == "__main__":
    main()
