"""Evaluates a checkpoint: python eval.py --checkpoint=DIR --task=perplexity|generate."""

import dataclasses
import sys
from typing import Annotated, Literal

from pydantic import Field

from vqcx_jax import cli
from vqcx_jax.config.schema.types import NonNegative, NonNegativeFloat, Positive
from vqcx_jax.errors import UserError
from vqcx_jax.evaluation import OVERRIDABLE, SplitLoss, TrainedModel
from vqcx_jax.paths import local_path

Probability = Annotated[float, Field(gt=0, le=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Evaluates a checkpoint. It brings its own configuration and tokenizer."""

    checkpoint: Annotated[str, "directory of a run, or of one of its checkpoints"]
    step: Annotated[NonNegative | None, "which checkpoint; none: the newest"] = None
    task: Annotated[Literal["perplexity", "generate"], "what to do"] = "perplexity"
    split: Annotated[Literal["train", "validation", "test"], "perplexity: of which text"] = (
        "validation"
    )
    num_documents: Annotated[Positive | None, "perplexity: of the first so many; none: all"] = None
    seq_len: Annotated[Positive | None, "perplexity: tokens in a row; none: as in training"] = None
    by_position: Annotated[
        bool, "perplexity: also by position in the document, which begins again where a row ends"
    ] = False
    text: Annotated[
        str | None, "perplexity: of all of this .txt or .jsonl file, directory or glob, no split"
    ] = None
    path: Annotated[
        str | None, "perplexity: where the text of training is; none: as in training"
    ] = None
    validation_path: Annotated[
        str | None, "perplexity: the same of its validation text, if it was a text of its own"
    ] = None
    cache_dir: Annotated[str | None, "perplexity: prepared corpora; none: as in training"] = None
    prompt: Annotated[str, "generate: text to continue"] = ""
    max_tokens: Annotated[Positive, "generate: at most so many tokens"] = 128
    temperature: Annotated[NonNegativeFloat, "generate: 0: most probable token"] = 0.8
    top_k: Annotated[Positive | None, "generate: from so many most probable tokens; none: all"] = (
        None
    )
    top_p: Annotated[
        Probability | None, "generate: from the fewest tokens this probable together; none: all"
    ] = None
    seed: Annotated[NonNegative, "generate: same seed, same text"] = 0


FLAGS_OF_TASK = {
    "perplexity": (
        "split",
        "num_documents",
        "seq_len",
        "by_position",
        "text",
        "path",
        "validation_path",
        "cache_dir",
    ),
    "generate": ("prompt", "max_tokens", "temperature", "top_k", "top_p", "seed"),
}


def main() -> None:
    flags, overrides = cli.parse_args(Flags, sys.argv[1:], OVERRIDABLE)
    check_flags(flags)
    model = TrainedModel.load(local_path("--checkpoint", flags.checkpoint), flags.step, overrides)
    if flags.task == "generate":
        text = model.generate(
            flags.prompt,
            max_tokens=flags.max_tokens,
            seed=flags.seed,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
        )
        print(flags.prompt + text)
        return
    result = model.perplexity(
        flags.split,
        text=flags.text,
        path=flags.path,
        validation_path=flags.validation_path,
        cache_dir=flags.cache_dir,
        num_documents=flags.num_documents,
        seq_len=flags.seq_len,
    )
    loss, units = result.loss, result.units
    print(f"step {model.step}, {flags.text or flags.split}: {units.documents:,} documents")
    if not result.same_corpus and flags.text is None:
        print("note: this is not the text of the training run; its splits may overlap with it")
    print(f"perplexity per token  {loss.perplexity:.4f}  ({loss.tokens:,} tokens)")
    print(f"perplexity per word   {loss.word_perplexity(units.words):.4f}  ({units.words:,} words)")
    print(f"bits per byte         {loss.bits_per_byte(units.bytes):.4f}  ({units.bytes:,} bytes)")
    if flags.by_position:
        print_by_position(loss)


def check_flags(flags: Flags) -> None:
    """Raises UserError for a flag that would be ignored."""
    for task, names in FLAGS_OF_TASK.items():
        for name in names if task != flags.task else ():
            value = getattr(flags, name)
            if value != getattr(Flags, name):
                raise UserError(f"--{name}={value!r}: must not be given with --task={flags.task}")
    if flags.text is not None and flags.split != Flags.split:
        raise UserError(f"--split={flags.split!r}: must not be given with --text={flags.text!r}")


def print_by_position(loss: SplitLoss) -> None:
    print("\npositions        perplexity per token")
    for part in loss.by_position:
        positions = f"{part.first:,} to {part.last:,}"
        print(f"{positions:<15} {part.loss.perplexity:>11.4f}  ({part.loss.tokens:,} tokens)")


if __name__ == "__main__":
    cli.run(main)
