"""A trained model loaded from nothing but its checkpoint, and what one asks of it."""

import dataclasses
from pathlib import Path

import jax

from vqcx_jax import checkpoint, data
from vqcx_jax.config import apply_overrides, from_json, schema
from vqcx_jax.data import Tokenizer
from vqcx_jax.evaluation.perplexity import SplitLoss, make_eval_step, split_loss
from vqcx_jax.evaluation.sample import sample_text
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.nn.functional import Tree
from vqcx_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Loss of a split and the size of its text.

    `same_corpus`: whether it is the text of the training run, or has changed since.
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
    def load(cls, path: Path, step: int | None = None) -> "TrainedModel":
        """Loads the newest checkpoint of a run, or that of `step`.

        The mesh of the training run does not matter: rows and weights are spread over the
        devices that are here.

        Raises:
            CheckpointError: no checkpoint there, or not that one.
        """
        directory, step = checkpoint.locate(path, step)
        run = checkpoint.load_run(directory, step)
        config = from_json(run["config"])
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
        split: str,
        *,
        path: str | None = None,
        cache_dir: str | None = None,
        num_documents: int | None = None,
    ) -> Perplexity:
        """Loss over a split of the corpus that the model was trained on.

        Args:
            split: "train", "validation" or "test".
            path: where the text lies on this machine (`data.dataset.path`); None: as in training.
            cache_dir: where prepared corpora are kept on this machine; None: as in training.
            num_documents: only the first so many; None: all.

        Raises:
            ConfigError: a path for a dataset that has none.
            DataError: the text cannot be read, or has no such split.
        """
        config = self.config
        if path is not None:
            config = apply_overrides(config, [("data.dataset.path", path)])
        directory = data.cache_directory(cache_dir or config.data.cache_dir)
        corpus = data.open_corpus(config.data.dataset, directory)
        source = corpus.split(split)
        devices = jax.device_count()
        batches = data.evaluation_dataset(
            source,
            self.tokenizer,
            vocab_size=config.model.known_vocab_size(),
            seq_len=config.data.seq_len,
            batch_size=-(-config.data.batch_size // devices) * devices,
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
            )
        return Perplexity(
            loss,
            data.count_units(source, num_documents),
            corpus.fingerprint == self.corpus_fingerprint,
        )

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
