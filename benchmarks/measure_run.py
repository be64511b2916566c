"""What a trained model is made of, and its losses by position: measure_run.py WORKDIR [LENGTH ...].

One line of JSON, for a campaign's results: sizes of the output layer, and for each length the
losses of the validation text in rows of so many tokens.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from vqcx_jax import checkpoint
from vqcx_jax.config import from_json, schema
from vqcx_jax.evaluation import TrainedModel
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model


def main() -> None:
    workdir, lengths = Path(sys.argv[1]), [int(length) for length in sys.argv[2:]]
    measured: dict[str, object] = {**sizes(workdir)}
    if lengths:
        measured["by_length"] = by_length(workdir, lengths)
    print(json.dumps(measured))


def sizes(workdir: Path) -> dict[str, int]:
    """What the output layer holds: vectors, scalars a token, and bits of codes."""
    config = from_json(checkpoint.load_run(*checkpoint.locate(workdir))["config"])
    vocab_size, head = config.model.known_vocab_size(), config.model.head
    _, params, _ = functional.split(abstract_model(config))
    # Scores of codes that are learned are gone when they are.
    head_params = {k: v for k, v in params.get("head", {}).items() if k != "scores"}
    arrays = jax.tree.leaves(head_params)
    scalars = sum(x.size for x in arrays if x.ndim == 1)
    code_bits = 0
    if isinstance(head, schema.VQHead):
        code_bits = vocab_size * head.num_codebooks * math.ceil(math.log2(head.num_codes))
    if isinstance(head, schema.ClassVQHead):
        num_classes, _, _ = head.sizes(vocab_size)
        code_bits = head.num_codebooks * math.ceil(math.log2(head.num_codes))
        code_bits *= vocab_size + num_classes
        code_bits += vocab_size * math.ceil(math.log2(num_classes + 1))
    return {
        "vocab_size": vocab_size,
        "embed_dim": config.model.embed_dim,
        "head_vectors": sum(x.size for x in arrays) - scalars,
        "head_scalars": scalars,
        "code_bits": code_bits,
        "trunk": sum(x.size for x in jax.tree.leaves(params.get("blocks", {}))),
    }


def by_length(workdir: Path, lengths: Sequence[int]) -> dict[str, list[tuple[float, ...]]]:
    """First and last position, nll and tokens, in rows of each length."""
    model = TrainedModel.load(workdir)
    found = {}
    for length in lengths:
        parts = model.perplexity("validation", seq_len=length).loss.by_position
        found[str(length)] = [(p.first, p.last, p.loss.nll, p.loss.tokens) for p in parts]
    return found


if __name__ == "__main__":
    main()
