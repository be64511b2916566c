"""What every tokenizer can do."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Ids = Sequence[int] | np.ndarray


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""

    @property
    def eos_id(self) -> int:
        """End of document; also the context of a document's first token."""

    def encode(self, text: str) -> np.ndarray:
        """Returns int32[n] ids; adds no special tokens."""

    def decode(self, ids: Ids) -> str:
        """Returns readable text; the end of a document leaves no mark but in word tokenizers."""

    def to_json(self) -> dict[str, Any]:
        """Returns all that `tokenizer_from_json` needs, free of files."""
