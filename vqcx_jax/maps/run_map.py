"""The token map that a run ended with, learned or not."""

from pathlib import Path
from typing import Any

import numpy as np

from vqcx_jax import checkpoint
from vqcx_jax.config import from_json, schema, to_json
from vqcx_jax.data import tokenizer_fingerprint, tokenizer_from_json
from vqcx_jax.errors import DataError
from vqcx_jax.maps.token_map import TokenClasses, TokenMap

# Not the statistics of `ReassignedVQHead`, which are as large as a full head.
_ARRAYS = {
    "params/head/codes",
    "params/head/codebooks",
    "params/head/scale",
    "params/head/own_vectors",
    "params/head/scores",
    "buffers/head/assignment",
    "buffers/head/neighbours",
    "buffers/head/own_tokens",
    "buffers/head/entries",
    "buffers/head/entry_of",
}


def run_map(path: Path) -> tuple[TokenMap, schema.VQHead | schema.ClassVQHead]:
    """The codes of a run's newest checkpoint, and the trained vectors and scales as a start.

    Codes that are learned (`learned_candidates`) are those of the highest scores; those of
    `reassign_every` are the last ones.

    Args:
        path: the run's workdir, or see `checkpoint.locate`.

    Returns:
        The map, whose provenance names the run, its step, head, corpus and tokenizer; and the head
        of the run.

    Raises:
        CheckpointError: no checkpoint there.
        DataError: a run whose head has no codes.
    """
    directory, step = checkpoint.locate(path)
    run = checkpoint.load_run(directory, step)
    config = from_json(run["config"])
    head = config.model.head
    if not isinstance(head, schema.VQHead | schema.ClassVQHead):
        raise DataError(
            f"from_run={str(path)!r}: a run with model.head.kind={head.kind!r}; "
            "must have codes, model.head.kind='vq' or 'class_vq'"
        )
    arrays = {
        name.rpartition("/")[2]: array
        for name, array in checkpoint.load_arrays(directory, step, _ARRAYS).items()
    }
    provenance = {
        "run": {"source": str(path), "step": step},
        "head": to_json(config)["model"]["head"],
        "corpus": run["corpus"],
        "tokenizer": tokenizer_fingerprint(tokenizer_from_json(run["tokenizer"])),
        # Of the map that the run began with; None where the checkpoint does not say.
        "began_with": (run.get("token_map") or {}).get("provenance"),
    }
    return _from_arrays(arrays, head, config.model.known_vocab_size(), provenance), head


def _from_arrays(
    arrays: dict[str, np.ndarray],
    head: schema.VQHead | schema.ClassVQHead,
    vocab_size: int,
    provenance: dict[str, Any],
) -> TokenMap:
    codes = arrays["assignment"].reshape(-1, head.num_codebooks).astype(np.int32)
    if "scores" in arrays:
        best_VxM = np.argmax(arrays["scores"], axis=-1)
        codes = arrays["neighbours"][np.arange(head.num_codebooks), codes, best_VxM]
    scale, classes = arrays.get("scale"), None
    if isinstance(head, schema.ClassVQHead):
        num_frequent = len(arrays["entries"]) - (len(codes) - vocab_size)
        of_token = np.maximum(arrays["entry_of"] - num_frequent, -1)
        of_classes = None if scale is None else scale[vocab_size:]
        classes = TokenClasses(of_token, codes[vocab_size:], of_classes)
        codes, scale = codes[:vocab_size], None if scale is None else scale[:vocab_size]
    codebooks = arrays["codebooks"] if "codebooks" in arrays else arrays["codes"][None]
    return TokenMap(
        codes=codes,
        num_codes=(head.num_codes,) * head.num_codebooks,
        codebooks=tuple(codebooks),
        scale=scale,
        own_tokens=arrays.get("own_tokens", np.zeros(0, np.int32)),
        own_vectors=arrays.get("own_vectors"),
        classes=classes,
        provenance=provenance,
    )
