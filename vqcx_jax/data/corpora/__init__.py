"""Where documents come from."""

from pathlib import Path

from vqcx_jax.config import schema
from vqcx_jax.data.corpora import python_stdlib, text_files, wikitext
from vqcx_jax.data.corpora.base import Corpus, Document, Source, is_blank
from vqcx_jax.data.corpora.prepare import prepare
from vqcx_jax.data.corpora.tfds_dataset import open_tfds

__all__ = ["Corpus", "Document", "Source", "is_blank", "open_corpus", "open_text"]


def open_text(path: str, cache_dir: Path, text_field: str = "text") -> Corpus:
    """Opens all of a text, its split "whole", as `open_corpus` does one of kind text_files.

    Raises:
        DataError: the text is missing, unreadable or empty.
    """
    return prepare(text_files.whole_recipe(path, text_field), cache_dir / "corpora")


def open_corpus(dataset: schema.Dataset, cache_dir: Path) -> Corpus:
    """Opens a dataset, preparing it under `cache_dir` the first time.

    Example:
        >>> corpus = open_corpus(schema.PythonStdlib(), Path("/tmp/cache"))
        >>> corpus.split("train")[0]["name"]  # doctest: +SKIP
        'asyncio/queues.py'

    Raises:
        DataError: the text is missing, unreadable or empty.
    """
    match dataset:
        case schema.PythonStdlib():
            recipe = python_stdlib.recipe()
        case schema.TextFiles():
            recipe = text_files.recipe(dataset)
        case schema.WikiText():
            recipe = wikitext.recipe(dataset, cache_dir / "downloads")
        case schema.TFDS():
            return open_tfds(dataset)
    return prepare(recipe, cache_dir / "corpora")
