"""SentencePiece models."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from vqcx_jax.data.tokenizers.base import Ids
from vqcx_jax.errors import DataError


class SentencePieceTokenizer:
    """A SentencePiece model; its </s> ends a document.

    Args:
        model: the bytes of the .model file.
        where: whence it came, for the message.

    Raises:
        DataError: the bytes are no model, or the model has no end-of-sentence piece.
    """

    def __init__(self, model: bytes, where: str) -> None:
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError):
            raise DataError(f"{where}: not a SentencePiece .model file") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{where}: the model has no end-of-sentence piece (eos_id is -1)")

    def encode(self, text: str) -> np.ndarray:
        """Returns int32[n] ids."""
        return np.asarray(self._processor.encode(text, out_type=int), np.int32)

    def decode(self, ids: Ids) -> str:
        """Returns the text, control pieces left out."""
        return self._processor.decode([int(i) for i in ids])

    def to_json(self) -> dict[str, Any]:
        """Returns the tokenizer as JSON values; the model in base64."""
        return {"kind": "sentencepiece", "model": base64.b64encode(self._model).decode()}


def load_sentencepiece(path: str) -> SentencePieceTokenizer:
    """Reads a .model file.

    Raises:
        DataError: the file is missing or not usable.
    """
    where = f"data.tokenizer.path={path!r}"
    try:
        model = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from None
    return SentencePieceTokenizer(model, where)
