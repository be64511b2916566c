"""Everything a run settles before its first step: text, tokenizer, sizes, token map."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vqcx_jax import data
from vqcx_jax.checkpoint import check_architecture, load_run
from vqcx_jax.config import check_vocab_size, from_json, schema, to_json, validate
from vqcx_jax.data import Corpus, Tokenizer
from vqcx_jax.data.cache import content_key
from vqcx_jax.errors import CheckpointError
from vqcx_jax.maps import TokenMap, log_shares, make_map, own_map
from vqcx_jax.maps.vectors import cooccurrence_vectors
from vqcx_jax.maps.widths import rank_for, widen
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.nn.heads import order_by_frequency
from vqcx_jax.paths import local_path

# What may differ between a run and the checkpoint it goes on from, besides the sections
# `optimizer`, `train` (but for the seed, which is used up), `mesh` and `sharding`: where things
# lie, not what they are.
_MAY_DIFFER = {
    "data.cache_dir",
    "data.prefetch",
    "data.dataset.path",
    "data.dataset.validation_path",
    "data.tokenizer.path",
    "model.attention.implementation",
    "model.dtype",
    "model.head.implementation",
    "model.head.token_map",
    "model.remat",
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run ready to start.

    Attributes:
        config: with model.vocab_size set.
        corpus: the text.
        tokenizer: made from the corpus or a file, or the checkpoint's.
        token_map: of a new run with a head of codes, or one that orders tokens by frequency.
        token_counts: int64 (V,), how often each token occurs in the training text; with token_map.
        map_record: of a resumed run, what its checkpoint says of the map, see `TokenMap.record`.
    """

    config: schema.Config
    corpus: Corpus
    tokenizer: Tokenizer
    token_map: TokenMap | None = None
    token_counts: np.ndarray | None = None
    map_record: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint stores beside the arrays."""
        return {
            "config": to_json(self.config),
            "tokenizer": self.tokenizer.to_json(),
            "corpus": self.corpus.record(),
            "token_map": self.token_map.record() if self.token_map else self.map_record,
        }


def prepare(config: schema.Config, checkpoints: Path, resume_step: int | None) -> Setup:
    """Opens the corpus, makes the tokenizer (or takes the checkpoint's) and resolves the config.

    Writes to the cache only: a run that cannot start leaves no trace in its directory.

    Raises:
        UserError: a corpus, tokenizer or token map that cannot be made.
        CheckpointError: the checkpoint is of another architecture (names every weight that
            differs), or the run would have other text, tokens or batches.
    """
    cache_dir = data.cache_directory(config.data.cache_dir)
    corpus = data.open_corpus(config.data.dataset, cache_dir)
    if resume_step is None:
        tokenizer = data.build_tokenizer(config.data.tokenizer, corpus, cache_dir)
        config = _resolve(config, tokenizer)
        return _with_token_map(Setup(config, corpus, tokenizer))
    run = load_run(checkpoints, resume_step)
    tokenizer = data.tokenizer_from_json(run["tokenizer"])
    resolved = _resolve(config, tokenizer)
    setup = Setup(resolved, corpus, tokenizer, map_record=run.get("token_map"))
    _, params, buffers = functional.split(abstract_model(setup.config))
    path = checkpoints / str(resume_step)
    check_architecture(path, {"params": params, "buffers": buffers})
    _check_same_run(setup, run, path)
    _check_same_map(setup, run, path)
    if resume_step > config.train.steps:
        raise CheckpointError(
            f"train.steps={config.train.steps}: must be at least {resume_step}, which the "
            f"checkpoint {str(path)!r} has done"
        )
    return setup


def _with_token_map(setup: Setup) -> Setup:
    config, model = setup.config, setup.config.model
    cache_dir = data.cache_directory(config.data.cache_dir)
    limit, vocab_size = config.data.count_tokens, model.known_vocab_size()

    def documents() -> Iterator[np.ndarray]:
        return data.encoded_documents(setup.tokenizer, setup.corpus.split("train"), limit)

    head = model.head
    vectors = None
    if isinstance(head, schema.FullHead) and head.start == "cooccurrence":
        vectors = cooccurrence_vectors(documents(), vocab_size, rank_for(model.embed_dim))
        vectors = widen(vectors, model.embed_dim)
    elif isinstance(head, schema.FullHead | schema.LowRankHead) and head.bias_init == "zeros":
        return setup
    counts = data.cached_token_counts(
        setup.tokenizer, setup.corpus, cache_dir, limit, vocab_size=vocab_size
    )
    if isinstance(head, schema.FullHead | schema.LowRankHead):
        return _with_biases(setup, own_map(vocab_size, vectors), counts)
    if isinstance(head, schema.AdaptiveHead | schema.HierarchicalHead):
        return dataclasses.replace(setup, token_map=order_by_frequency(head, counts))
    tokenizer = data.tokenizer_fingerprint(setup.tokenizer)
    sizes = [vocab_size, model.embed_dim]
    of_head = to_json(config)["model"]["head"]
    del of_head["implementation"]
    made_from = [of_head, sizes, setup.corpus.fingerprint, tokenizer, {"tokens": limit}]
    token_map = make_map(
        head,
        vocab_size=vocab_size,
        embed_dim=model.embed_dim,
        counts=counts,
        seed=config.train.seed,
        tokenizer=tokenizer,
        text={"corpus": setup.corpus.record(), "count_tokens": limit},
        documents=documents,
        cached_at=cache_dir / "token_maps" / f"{content_key(made_from)}.npz",
    )
    return _with_biases(setup, token_map, counts)


def _with_biases(setup: Setup, token_map: TokenMap, counts: np.ndarray) -> Setup:
    """The setup with a map, which says where biases start."""
    if getattr(setup.config.model.head, "bias_init", "zeros") == "counts":
        token_map = dataclasses.replace(token_map, bias=log_shares(counts))
    return dataclasses.replace(setup, token_map=_agreed(token_map), token_counts=counts)


def _agreed(token_map: TokenMap) -> TokenMap:
    """The map that process 0 has made.

    Every process makes one, or reads it from its own cache: they then wait for each other no longer
    than one takes, and maps may differ in the last digits, then in codes.
    """
    if jax.process_count() == 1:
        return token_map
    arrays = token_map.to_arrays()
    # What is sent goes through JAX, which has no int64; sizes are the same everywhere.
    sizes = {"num_codes": arrays.pop("num_codes")}
    agreed = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays))
    return TokenMap.from_arrays(agreed | sizes, token_map.provenance)


def _resolve(config: schema.Config, tokenizer: Tokenizer) -> schema.Config:
    if config.model.vocab_size is None:
        model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        config = dataclasses.replace(config, model=model)
    check_vocab_size(config.model, tokenizer.vocab_size)
    return validate(config, jax.device_count())


def _check_same_run(setup: Setup, run: dict[str, Any], path: Path) -> None:
    saved, wanted = _flat(to_json(from_json(run["config"]))), _flat(to_json(setup.config))
    for name in sorted(saved.keys() | wanted.keys()):
        fixed = name.startswith(("data.", "model.", "train.seed")) and name not in _MAY_DIFFER
        if fixed and saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{name}={wanted.get(name)!r}: the checkpoint {str(path)!r} was made with "
                f"{saved.get(name)!r}; use that value, or another --workdir"
            )
    if setup.corpus.fingerprint != run["corpus"]["fingerprint"]:
        raise CheckpointError(
            f"data.dataset: its text is not that of the checkpoint {str(path)!r} (fingerprint "
            f"{setup.corpus.fingerprint}, was {run['corpus']['fingerprint']}); "
            "use that text, or another --workdir"
        )


def _check_same_map(setup: Setup, run: dict[str, Any], path: Path) -> None:
    """The checkpoint has the map: a file elsewhere is not needed, but must be no other one."""
    head, record = setup.config.model.head, setup.map_record
    if not isinstance(head, schema.VQHead | schema.ClassVQHead) or head.token_map is None:
        return
    if record is None or head.token_map == run["config"]["model"]["head"]["token_map"]:
        return
    elsewhere = local_path("model.head.token_map", head.token_map)
    if not elsewhere.exists():
        return
    token_map = TokenMap.load(elsewhere)
    if isinstance(head, schema.VQHead):  # Which leaves classes out.
        token_map = dataclasses.replace(token_map, classes=None)
    if token_map.record()["fingerprint"] != record["fingerprint"]:
        raise CheckpointError(
            f"model.head.token_map={head.token_map!r}: is not the map of the checkpoint "
            f"{str(path)!r}; use that map, or another --workdir"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
