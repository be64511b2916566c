"""White-space words; the newline is the token <eos>."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from vqcx_jax.data.tokenizers.base import Ids
from vqcx_jax.errors import DataError

_EOS = "<eos>"
_UNKNOWN = "<unk>"


class WordTokenizer:
    """A fixed list of words; any other word is <unk>.

    Args:
        words: the vocabulary in id order, with <eos> and <unk> among it.
    """

    def __init__(self, words: list[str]) -> None:
        self._words = words
        self._ids = {word: i for i, word in enumerate(words)}
        self._unknown_id = self._ids[_UNKNOWN]
        self.vocab_size = len(words)
        self.eos_id = self._ids[_EOS]

    def encode(self, text: str) -> np.ndarray:
        """Returns int32[n], n the number of words and newlines."""
        words = text.replace("\n", f" {_EOS} ").split()
        unknown_id = self._unknown_id
        return np.fromiter((self._ids.get(w, unknown_id) for w in words), np.int32, len(words))

    def decode(self, ids: Ids) -> str:
        """Returns words joined by spaces, and a newline for every <eos>."""
        words = ("\n" if i == self.eos_id else self._words[i] for i in ids)
        return re.sub(" ?\n ?", "\n", " ".join(words))

    def to_json(self) -> dict[str, Any]:
        """Returns the tokenizer as JSON values."""
        return {"kind": "word", "words": self._words}


def build_words(texts: Iterable[str], max_vocab_size: int | None) -> list[str]:
    """Returns the words of texts, most frequent first, then in alphabetical order.

    <eos> and <unk> always have a place; <eos> counts newlines and ends of documents.

    Raises:
        DataError: `max_vocab_size` leaves no room for a word.
    """
    if max_vocab_size is not None and max_vocab_size < 3:
        raise DataError(f"data.tokenizer.max_vocab_size={max_vocab_size}; accepted: 3 or more")
    counts: Counter[str] = Counter({_EOS: 0, _UNKNOWN: 0})
    for text in texts:
        counts.update(text.split())
        counts[_EOS] += text.count("\n") + 1
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    if max_vocab_size is not None and len(ranked) > max_vocab_size:
        ordinary = [word for word in ranked if word not in (_EOS, _UNKNOWN)]
        kept = {_EOS, _UNKNOWN, *ordinary[: max_vocab_size - 2]}
        ranked = [word for word in ranked if word in kept]
    return ranked
