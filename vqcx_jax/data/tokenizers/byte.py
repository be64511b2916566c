"""One token per UTF-8 byte."""

from typing import Any

import numpy as np

from vqcx_jax.data.tokenizers.base import Ids


class ByteTokenizer:
    """Ids 0 to 255 are bytes; 256 is the end of a document."""

    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        """Returns int32[n], n the number of UTF-8 bytes."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Ids) -> str:
        """Returns the text; a broken character is shown as U+FFFD."""
        return bytes(int(i) for i in ids if i != self.eos_id).decode(errors="replace")

    def to_json(self) -> dict[str, Any]:
        """Returns the tokenizer as JSON values."""
        return {"kind": "bytes"}
