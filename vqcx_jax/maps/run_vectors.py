"""One vector per token from a short run: its trained output layer."""

from pathlib import Path

import numpy as np

from vqcx_jax import checkpoint
from vqcx_jax.config import from_json, schema
from vqcx_jax.data import tokenizer_fingerprint, tokenizer_from_json
from vqcx_jax.errors import DataError


def head_vectors(path: Path, vocab_size: int, tokenizer: str) -> np.ndarray:
    """The output layer of a run with a full head, from its newest checkpoint. Float32 (V, D).

    Args:
        path: the run's workdir, or see `checkpoint.locate`.
        vocab_size: V.
        tokenizer: fingerprint of the tokenizer in use.

    Raises:
        CheckpointError: no checkpoint there.
        DataError: a run without a full head, or with another vocabulary.
    """
    directory, step = checkpoint.locate(path)
    run = checkpoint.load_run(directory, step)
    model = from_json(run["config"]).model
    if not isinstance(model.head, schema.FullHead):
        raise DataError(
            f"vectors={str(path)!r}: a run with model.head.kind={model.head.kind!r}; "
            "must have a vector per token, model.head.kind='full'"
        )
    made_for = tokenizer_fingerprint(tokenizer_from_json(run["tokenizer"]))
    if model.known_vocab_size() != vocab_size or made_for != tokenizer:
        raise DataError(
            f"vectors={str(path)!r}: a run with another vocabulary, {model.vocab_size} tokens of "
            f"the tokenizer {made_for}; must be {vocab_size} of {tokenizer}"
        )
    return checkpoint.load_parameter(directory, step, "head/weights")
