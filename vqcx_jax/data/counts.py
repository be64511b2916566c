"""Statistics of documents: how often each token occurs, how many words and bytes there are."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqcx_jax.data.cache import cached_json, content_key
from vqcx_jax.data.corpora import Corpus, Document, Source, is_blank
from vqcx_jax.data.tokenizers import Tokenizer


class Units(NamedTuple):
    """Sizes by which losses are compared across tokenizers."""

    documents: int
    words: int
    bytes: int


def count_units(source: Source, num_documents: int | None = None) -> Units:
    """Counts the documents that `evaluation_dataset` scores, their words and UTF-8 bytes.

    Args:
        source: the documents.
        num_documents: take only the first so many of the source.
    """
    documents = words = num_bytes = 0
    for document in _scored(source, num_documents):
        documents += 1
        words += len(document["text"].split())
        num_bytes += len(document["text"].encode())
    return Units(documents, words, num_bytes)


def token_counts(tokenizer: Tokenizer, source: Source, limit: int | None = None) -> np.ndarray:
    """Counts the targets of training: every token, and one end per document.

    Args:
        tokenizer: gives the tokens.
        source: the documents.
        limit: count only the first so many tokens. None: all.

    Returns:
        int64[vocab_size].
    """
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for tokens in encoded_documents(tokenizer, source, limit):
        counts += np.bincount(tokens, minlength=len(counts))
    return counts


def encoded_documents(
    tokenizer: Tokenizer, source: Source, limit: int | None = None
) -> Iterator[np.ndarray]:
    """The targets of training, int32 (n,) a document: its tokens and its end.

    No document is read once there are `limit` tokens; the last one is cut there.

    Args:
        tokenizer, source, limit: see `token_counts`.
    """
    left = math.inf if limit is None else limit
    documents = _scored(source, None)
    while left > 0 and (document := next(documents, None)) is not None:
        tokens = np.append(tokenizer.encode(document["text"]), np.int32(tokenizer.eos_id))
        yield tokens if len(tokens) <= left else tokens[: int(left)]
        left -= len(tokens)


def cached_token_counts(
    tokenizer: Tokenizer,
    corpus: Corpus,
    cache_dir: Path,
    limit: int | None = None,
    *,
    vocab_size: int | None = None,
) -> np.ndarray:
    """Returns `token_counts` of the training split, kept under `cache_dir`.

    Args:
        tokenizer, limit: see `token_counts`.
        corpus: whose training split is counted.
        cache_dir: see `cache_directory`.
        vocab_size: of the model, which may have more tokens than the tokenizer (none of them
            occurs). None: the tokenizer's.
    """
    key = content_key([corpus.fingerprint, tokenizer.to_json(), {"tokens": limit}])
    counts = cached_json(
        cache_dir / "token_counts" / f"{key}.json",
        lambda: token_counts(tokenizer, corpus.split("train"), limit).tolist(),
    )
    size = len(counts) if vocab_size is None else vocab_size
    return np.asarray(counts + [0] * (size - len(counts)), np.int64)[:size]


def _scored(source: Source, limit: int | None) -> Iterator[Document]:
    documents = (source[i] for i in islice(range(len(source)), limit))
    return (document for document in documents if not is_blank(document))
