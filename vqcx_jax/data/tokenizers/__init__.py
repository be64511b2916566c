"""How text becomes token ids."""

import base64
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from vqcx_jax.config import schema
from vqcx_jax.data.cache import cached_json, content_key
from vqcx_jax.data.corpora import Corpus
from vqcx_jax.data.tokenizers.base import Tokenizer
from vqcx_jax.data.tokenizers.bpe import EOS_TOKEN, train_bpe
from vqcx_jax.data.tokenizers.byte import ByteTokenizer
from vqcx_jax.data.tokenizers.hugging_face import (
    HuggingFaceTokenizer,
    load_json_tokenizer,
    parse_tokenizer,
)
from vqcx_jax.data.tokenizers.sentence_piece import SentencePieceTokenizer, load_sentencepiece
from vqcx_jax.data.tokenizers.word import WordTokenizer, build_words
from vqcx_jax.errors import DataError

__all__ = ["Tokenizer", "build_tokenizer", "tokenizer_fingerprint", "tokenizer_from_json"]


def build_tokenizer(cfg: schema.Tokenizer, corpus: Corpus, cache_dir: Path) -> Tokenizer:
    """Makes the tokenizer a configuration asks for.

    Tokenizers that are learnt from the training split are kept under `cache_dir`, one file per
    corpus and configuration.

    Raises:
        DataError: a file is unreadable, or the corpus is too small for the vocabulary.
    """
    match cfg:
        case schema.BytesTokenizer():
            return ByteTokenizer()
        case schema.JSONTokenizer():
            return load_json_tokenizer(cfg.path, cfg.eos_token)
        case schema.SentencePieceTokenizer():
            return load_sentencepiece(cfg.path)
    key = content_key([corpus.fingerprint, asdict(cfg)])
    path = cache_dir / "tokenizers" / f"{cfg.kind}-{key}.json"
    return tokenizer_from_json(cached_json(path, lambda: _train(cfg, corpus)))


def tokenizer_from_json(value: dict[str, Any]) -> Tokenizer:
    """Makes a tokenizer from what its `to_json` returned.

    Raises:
        DataError: the value describes no tokenizer.
    """
    match value:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "word", "words": words}:
            return WordTokenizer(words)
        case {"kind": "json", "tokenizer": text, "eos_token": eos_token}:
            return HuggingFaceTokenizer(parse_tokenizer(text, "tokenizer"), eos_token)
        case {"kind": "sentencepiece", "model": model}:
            return SentencePieceTokenizer(base64.b64decode(model), "tokenizer")
    raise DataError(
        f"tokenizer kind={value.get('kind')!r} with {', '.join(value) or 'nothing'}; "
        "accepted: what to_json returns"
    )


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Identity of a vocabulary and of how text becomes tokens; the same on every machine."""
    return content_key(tokenizer.to_json())


def _train(cfg: schema.BPETokenizer | schema.WordTokenizer, corpus: Corpus) -> dict[str, Any]:
    """Learns a vocabulary from the training split and returns the tokenizer's JSON value."""
    if isinstance(cfg, schema.WordTokenizer):
        return {"kind": "word", "words": build_words(_texts(corpus, None), cfg.max_vocab_size)}
    text = train_bpe(_texts(corpus, cfg.train_documents), cfg.vocab_size)
    return {"kind": "json", "tokenizer": text, "eos_token": EOS_TOKEN}


def _texts(corpus: Corpus, limit: int | None) -> Iterator[str]:
    source = corpus.split("train")
    return (source[i]["text"] for i in islice(range(len(source)), limit))
