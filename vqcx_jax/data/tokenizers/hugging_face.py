"""Tokenizers in the JSON form of Hugging Face's `tokenizers` library."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from vqcx_jax.data.tokenizers.base import Ids
from vqcx_jax.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_USUAL_EOS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


class HuggingFaceTokenizer:
    """A `tokenizers.Tokenizer` and the token that ends a document.

    Special tokens that stand in the text literally, such as <|endoftext|>, get their ids.

    Raises:
        DataError: `eos_token` is not in the vocabulary.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_token: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise DataError(_no_eos(tokenizer, f"data.tokenizer.eos_token={eos_token!r}"))
        self._tokenizer = tokenizer
        self._eos_token = eos_token
        self.eos_id: int = eos_id
        # Not the number of tokens: some published vocabularies have holes.
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """Returns int32[n] ids."""
        # The batch form leaves out character offsets, which nobody needs here.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.asarray(encoding.ids, np.int32)

    def decode(self, ids: Ids) -> str:
        """Returns the text, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> dict[str, Any]:
        """Returns the tokenizer as JSON values."""
        return {
            "kind": "json",
            "tokenizer": self._tokenizer.to_str(),
            "eos_token": self._eos_token,
        }


def parse_tokenizer(text: str, where: str) -> tokenizers.Tokenizer:
    """Reads a tokenizer from its JSON text.

    Raises:
        DataError: it is not one; `where` says whence it came.
    """
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises a bare Exception.
        raise DataError(f"{where}: not a tokenizers JSON file ({error})") from None


def load_json_tokenizer(path: str, eos_token: str | None) -> HuggingFaceTokenizer:
    """Reads a tokenizers JSON file, which may be gzipped.

    Raises:
        DataError: the file is missing or not a tokenizer, or its end-of-document token is
            neither named nor one of the usual ones.
    """
    where = f"data.tokenizer.path={path!r}"
    try:
        data = Path(path).expanduser().read_bytes()
        text = (gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read ({error})") from None
    tokenizer = parse_tokenizer(text, where)
    if eos_token is None:
        eos_token = next((t for t in _USUAL_EOS if tokenizer.token_to_id(t) is not None), None)
    if eos_token is None:
        raise DataError(_no_eos(tokenizer, f"{where} has none of the usual end tokens"))
    return HuggingFaceTokenizer(tokenizer, eos_token)


def _no_eos(tokenizer: tokenizers.Tokenizer, problem: str) -> str:
    added = tokenizer.get_added_tokens_decoder()
    special = [added[i].content for i in sorted(added) if added[i].special]
    shown = ", ".join(special[:20]) or "none"
    return f"{problem}; set data.tokenizer.eos_token; special tokens: {shown}"
