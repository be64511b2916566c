"""A trained model loaded from nothing but its checkpoint, and what one asks of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from vqcx_jax import checkpoint, data
from vqcx_jax.config import apply_overrides, from_json, schema, validate
from vqcx_jax.data import Corpus, Tokenizer
from vqcx_jax.errors import ConfigError
from vqcx_jax.evaluation.perplexity import (
    SplitLoss,
    doubling_bounds,
    make_eval_step,
    split_loss,
)
from vqcx_jax.evaluation.sample import sample_text
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.nn.functional import Tree
from vqcx_jax.sharding import make_mesh

# What has no weights: a model may have these otherwise than in training.
OVERRIDABLE = (
    "model.attention.window",
    "model.attention.implementation",
    "model.attention.logit_soft_cap",
    "model.attention.extension",
    "model.attention.extension_factor",
    "model.attention.trained_length",
    "model.head.implementation",
)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Loss of a split and the size of its text.

    `same_corpus`: whether it is the text of the training run, and has not changed since.
    """

    loss: SplitLoss
    units: data.Units
    same_corpus: bool


class TrainedModel:
    """Parameters on this machine's devices, with the config and tokenizer they were trained with.

    Example:
        model = TrainedModel.load(Path("runs/quickstart"))
        print(model.perplexity("validation").loss.perplexity)
        print(model.generate("def main(", max_tokens=50, seed=0))
    """

    def __init__(
        self,
        config: schema.Config,
        tokenizer: Tokenizer,
        params: Tree,
        buffers: Tree,
        mesh: jax.sharding.Mesh,
        step: int,
        corpus_fingerprint: str,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.corpus_fingerprint = corpus_fingerprint
        self.params = params
        self.buffers = buffers
        self.mesh = mesh
        self.step = step

    @classmethod
    def load(
        cls, path: Path, step: int | None = None, overrides: Sequence[tuple[str, str]] = ()
    ) -> "TrainedModel":
        """Loads the newest checkpoint of a run, or that of `step`.

        The mesh of the training run does not matter: rows and weights are spread over the
        devices that are here.

        Args:
            path: a run's directory, or that of one of its checkpoints.
            step: None: the newest.
            overrides: of fields of `OVERRIDABLE`, as in `config.apply_overrides`.

        Raises:
            CheckpointError: no checkpoint there, or not that one.
            ConfigError: an override of another field, or of one that this attention does not have;
                values that do not fit together.
        """
        for name, text in overrides:
            if name not in OVERRIDABLE:
                raise ConfigError(
                    f"{name}={text!r}: cannot change after training; accepted are "
                    f"{', '.join(OVERRIDABLE)}"
                )
        directory, step = checkpoint.locate(path, step)
        run = checkpoint.load_run(directory, step)
        config = from_json(run["config"])
        if overrides:
            config = validate(apply_overrides(config, overrides))
        devices = jax.device_count()
        mesh = make_mesh({"data": 1, "fsdp": devices, "tensor": 1}, "auto")
        # Not the rules of the training run: what they split may not be divisible by these devices.
        rules = schema.ShardingRules(embed=() if config.model.embed_dim % devices else ("fsdp",))
        config = dataclasses.replace(config, sharding=rules)
        model = abstract_model(config)
        _, params, buffers = functional.split(model)
        shardings = functional.shardings(model, mesh, config.sharding)
        abstract = {
            name: jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, sharding
            )
            for name, shapes, sharding in zip(
                ("params", "buffers"), (params, buffers), shardings, strict=True
            )
        }
        loaded = checkpoint.load_model(directory, step, abstract)
        tokenizer = data.tokenizer_from_json(run["tokenizer"])
        fingerprint = run["corpus"]["fingerprint"]
        return cls(config, tokenizer, loaded["params"], loaded["buffers"], mesh, step, fingerprint)

    def perplexity(
        self,
        split: str = "validation",
        *,
        text: str | None = None,
        path: str | None = None,
        validation_path: str | None = None,
        cache_dir: str | None = None,
        num_documents: int | None = None,
        seq_len: int | None = None,
    ) -> Perplexity:
        """Loss over a split of the corpus that the model was trained on, or over another text.

        Its `by_position` has buckets that end at the length of the rows of training, and at that
        halved and doubled again and again.

        Args:
            split: "train", "validation" or "test"; not looked at with `text`.
            text: all of this file, directory or glob (.txt: a document a file; .jsonl: one a line,
                in the field that the run reads, or "text") in place of a split.
            path, validation_path, cache_dir: see `open_corpus`.
            num_documents: only the first so many; None: all.
            seq_len: tokens in a row, at which documents are cut; None: as in training.

        Raises:
            ConfigError: as `open_corpus`; a path beside `text`; seq_len below 1.
            DataError: the text cannot be read, or has no such split.
        """
        config, trained_length = self.config, self.config.data.seq_len
        if seq_len is not None:
            config = apply_overrides(config, [("data.seq_len", str(seq_len))])
        seq_len = config.data.seq_len
        if text is None:
            corpus = self.open_corpus(path, validation_path, cache_dir)
        else:
            for name, given in (("path", path), ("validation_path", validation_path)):
                if given is not None:
                    raise ConfigError(f"{name}={given!r}: must not be given with text={text!r}")
            field = getattr(config.data.dataset, "text_field", "text")
            corpus, split = data.open_text(text, self._cache(cache_dir), field), "whole"
        source = corpus.split(split)
        devices = jax.device_count()
        # As many tokens as in training, or a row for each device.
        rows = -(-config.data.batch_size * trained_length // (seq_len * devices)) * devices
        batches = data.evaluation_dataset(
            source,
            self.tokenizer,
            vocab_size=config.model.known_vocab_size(),
            seq_len=seq_len,
            batch_size=rows,
            num_documents=num_documents,
        )
        graphdef, _, _ = functional.split(abstract_model(config))
        with jax.set_mesh(self.mesh):
            loss = split_loss(
                make_eval_step(graphdef),
                self.params,
                self.buffers,
                batches,
                self.mesh,
                config.sharding,
                bounds=doubling_bounds(trained_length, seq_len),
            )
        return Perplexity(
            loss,
            data.count_units(source, num_documents),
            corpus.fingerprint == self.corpus_fingerprint,
        )

    def open_corpus(
        self,
        path: str | None = None,
        validation_path: str | None = None,
        cache_dir: str | None = None,
    ) -> Corpus:
        """The text that the model was trained on.

        Args:
            path: where it lies on this machine (`data.dataset.path`); None: as in training.
            validation_path: the same of `data.dataset.validation_path`; must be given with a path
                if the run had one.
            cache_dir: where prepared corpora are kept on this machine; None: as in training.

        Raises:
            ConfigError: paths that the dataset does not have, or one of its two.
            DataError: the text cannot be read.
        """
        config = self.config
        held_out = getattr(config.data.dataset, "validation_path", None)
        if path is not None and held_out is not None and validation_path is None:
            raise ConfigError(
                f"path={path!r}: needs validation_path, too; the run had "
                f"data.dataset.validation_path={held_out!r}"
            )
        if validation_path is not None and held_out is None:
            raise ConfigError(
                f"validation_path={validation_path!r}: must not be given, the run had none"
            )
        for name, value in (("path", path), ("validation_path", validation_path)):
            if value is not None:
                config = apply_overrides(config, [(f"data.dataset.{name}", value)])
        return data.open_corpus(config.data.dataset, self._cache(cache_dir))

    def _cache(self, cache_dir: str | None) -> Path:
        return data.cache_directory(cache_dir or self.config.data.cache_dir)

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int,
        seed: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> str:
        """The text that the model adds to `prompt`, up to the end of the document.

        Args and errors: see `evaluation.generation.generate`.
        """
        with jax.set_mesh(self.mesh):
            return sample_text(
                self.config,
                self.params,
                self.buffers,
                self.tokenizer,
                prompt,
                max_tokens,
                seed=seed,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )
