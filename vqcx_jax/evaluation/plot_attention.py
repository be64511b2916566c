"""Draws a run's attention: python -m vqcx_jax.evaluation.plot_attention --checkpoint=DIR ..."""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from flax import nnx

from vqcx_jax import cli, data
from vqcx_jax.config.schema.types import NonNegative, Positive
from vqcx_jax.errors import UserError
from vqcx_jax.evaluation.attention_figure import draw, require_matplotlib
from vqcx_jax.evaluation.attention_stats import attention_by_distance, learned_arrays
from vqcx_jax.evaluation.trained import OVERRIDABLE, TrainedModel
from vqcx_jax.nn import Transformer, functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.paths import local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Draws what a model's attention has learned, and its mean weights by distance.

    The weights are those of rows of validation text, in float32. The numbers go into an .npz file
    beside the figure.
    """

    checkpoint: Annotated[str, "directory of a run, or of one of its checkpoints"]
    output: Annotated[str, "file to write, .svg"]
    step: Annotated[NonNegative | None, "which checkpoint; none: the newest"] = None
    rows: Annotated[Positive, "so many rows of text"] = 8
    seq_len: Annotated[Positive | None, "tokens in a row; none: as in training"] = None
    path: Annotated[str | None, "where the text is; none: as in training"] = None
    validation_path: Annotated[
        str | None, "where its validation text is, if it was a text of its own"
    ] = None
    cache_dir: Annotated[str | None, "prepared corpora; none: as in training"] = None
    overwrite: Annotated[bool, "replace existing files"] = False


def main() -> None:
    """Loads the checkpoint, computes the numbers, writes and names both files."""
    flags, overrides = cli.parse_args(Flags, sys.argv[1:], OVERRIDABLE)
    figure, numbers = _outputs(flags)
    require_matplotlib()
    trained = TrainedModel.load(local_path("--checkpoint", flags.checkpoint), flags.step, overrides)
    config = trained.config
    corpus = trained.open_corpus(flags.path, flags.validation_path, flags.cache_dir)
    batches = data.evaluation_dataset(
        corpus.split("validation"),
        trained.tokenizer,
        vocab_size=config.model.known_vocab_size(),
        seq_len=flags.seq_len or config.data.seq_len,
        batch_size=1,
    )
    model = float32_model(trained)
    learned = learned_arrays(model)
    by_distance = attention_by_distance(model, itertools.islice(batches, flags.rows))
    arrays: dict[str, Any] = {**learned, "sums": by_distance.sums, "pairs": by_distance.pairs}
    title = f"{config.model.attention.kind}, step {trained.step}"
    try:
        figure.parent.mkdir(parents=True, exist_ok=True)
        np.savez(numbers, **arrays)
        draw(learned, by_distance, title, figure)
    except OSError as error:
        raise UserError(
            f"--output={flags.output!r}: cannot be written: {error.strerror}"
        ) from error
    print(f"wrote {figure} and {numbers}")


def float32_model(trained: TrainedModel) -> Transformer:
    """The model on one device, with activations in float32."""
    device = jax.devices()[0]
    model = dataclasses.replace(trained.config.model, dtype="float32")
    graphdef, _, _ = functional.split(
        abstract_model(dataclasses.replace(trained.config, model=model))
    )
    return nnx.merge(graphdef, *jax.device_put((trained.params, trained.buffers), device))


def _outputs(flags: Flags) -> tuple[Path, Path]:
    figure = local_path("--output", flags.output)
    if figure.suffix != ".svg":
        raise UserError(f"--output={flags.output!r}: must end in .svg")
    numbers = figure.with_suffix(".npz")
    for path in (figure, numbers):
        if path.exists() and not flags.overwrite:
            raise UserError(
                f"--output={flags.output!r}: {path} exists; --overwrite=true replaces it"
            )
    return figure, numbers


if __name__ == "__main__":
    cli.run(main)
