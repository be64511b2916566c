"""What the fields of a configuration must satisfy together."""

import math
from dataclasses import fields
from typing import NoReturn

from vqcx_jax.config.mesh import minimum_mesh_shape, resolve_mesh_shape
from vqcx_jax.config.schema import (
    TFDS,
    AdaptiveHead,
    AttentionConfig,
    ClassVQHead,
    Config,
    Data,
    FullHead,
    HierarchicalHead,
    JSONTokenizer,
    LowRankHead,
    MeshAxes,
    MeshAxis,
    Model,
    Optimizer,
    Rotary,
    SentencePieceTokenizer,
    ShardingRules,
    TextFiles,
    VQHead,
)
from vqcx_jax.errors import ConfigError

# The logical axes of each array: a mesh axis can shard only one of them.
_WEIGHTS = (
    ("embed", "heads"),
    ("embed", "mlp"),
    ("vocab", "embed"),
    ("codes", "embed"),
)
_ACTIVATIONS = (
    ("batch", "sequence"),
    ("batch", "heads"),
    ("batch", "mlp"),
    ("sequence", "heads"),
    ("sequence", "mlp"),
)


def validate(config: Config, device_count: int | None = None) -> Config:
    """Returns `config` unchanged if its fields fit together.

    Args:
      config: what to check.
      device_count: devices of all processes. None: a mesh axis of -1 may become any size.

    Raises:
      ConfigError: names the field, its value and what is accepted.
    """
    _check_model(config.model)
    _check_z_loss(config)
    _check_data(config.data)
    _check_schedule(config.optimizer, config.train.steps)
    _check_sharding_rules(config.sharding)
    if device_count is None:
        mesh = minimum_mesh_shape(config.mesh)
    else:
        mesh = resolve_mesh_shape(config.mesh, device_count)
    _check_sizes(config, mesh)
    _check_sequence(config.sharding, mesh)
    return config


def _fail(field: str, value: object, accepted: str) -> NoReturn:
    raise ConfigError(f"{field}={value!r}: {accepted}")


def _check_model(model: Model) -> None:
    if model.head_dim % 2:
        _fail("model.head_dim", model.head_dim, "must be even, attention rotates pairs")
    if model.num_heads % model.num_kv_heads:
        _fail(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"must divide model.num_heads={model.num_heads}",
        )
    check_attention(model.attention)
    if isinstance(model.head, LowRankHead) and model.head.rank > model.embed_dim:
        _fail(
            "model.head.rank",
            model.head.rank,
            f"must be at most model.embed_dim={model.embed_dim}",
        )
    if isinstance(model.head, VQHead | ClassVQHead | FullHead | LowRankHead):
        _check_bias(model.head)
    if isinstance(model.head, AdaptiveHead):
        _check_clusters(model.head, model)
    if isinstance(model.head, VQHead):
        _check_codes(model.head, model.vocab_size)
        _check_form(model.head, model.embed_dim)
        _check_learned(model.head)
        _check_token_map(model.head)
    if isinstance(model.head, ClassVQHead):
        _check_codes(model.head.codes(), model.vocab_size)
        _check_form(model.head.codes(), model.embed_dim)
        _check_classes(model.head, model.vocab_size)
        _check_token_map(model.head.codes())


def check_attention(attention: AttentionConfig) -> None:
    """Raises ConfigError for options that do not fit each other."""
    if not isinstance(attention, Rotary):
        return
    extension, factor = attention.extension, attention.extension_factor
    if extension == "none" and factor != 1:
        accepted = "must be 1 with model.attention.extension='none'"
        _fail("model.attention.extension_factor", factor, accepted)
    if extension != "yarn" and attention.trained_length is not None:
        accepted = f"must be None with model.attention.extension={extension!r}, for 'yarn' only"
        _fail("model.attention.trained_length", attention.trained_length, accepted)
    if extension == "yarn" and attention.trained_length is None:
        accepted = "must be the positions of training for model.attention.extension='yarn'"
        _fail("model.attention.trained_length", None, accepted)
    if extension != "none" and factor == 1:
        accepted = f"must be above 1 with model.attention.extension={extension!r}"
        _fail("model.attention.extension_factor", factor, accepted)


def _check_classes(head: ClassVQHead, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    num_classes, num_frequent, _ = head.sizes(vocab_size)
    if num_frequent >= vocab_size:
        accepted = f"must be less than model.vocab_size={vocab_size}"
        _fail("model.head.num_frequent", num_frequent, accepted)
    if num_classes > vocab_size - num_frequent:
        _fail(
            "model.head.num_classes",
            num_classes,
            f"must be at most model.vocab_size={vocab_size} less "
            f"model.head.num_frequent={num_frequent}",
        )


def _check_bias(head: VQHead | ClassVQHead | FullHead | LowRankHead) -> None:
    if head.bias_init == "counts" and not head.token_bias:
        _fail("model.head.bias_init", head.bias_init, "needs model.head.token_bias=true")


def _check_clusters(head: AdaptiveHead, model: Model) -> None:
    cutoffs = ",".join(map(str, head.cutoffs))
    if not head.cutoffs or list(head.cutoffs) != sorted(set(head.cutoffs)):
        _fail("model.head.cutoffs", cutoffs, "must be one or more rising numbers")
    if model.vocab_size is not None and head.cutoffs[-1] >= model.vocab_size:
        _fail(
            "model.head.cutoffs",
            cutoffs,
            f"must end below model.vocab_size={model.vocab_size}",
        )
    if model.embed_dim < head.div_value ** len(head.cutoffs):
        _fail(
            "model.head.div_value",
            head.div_value,
            f"leaves the last of {len(head.cutoffs)} clusters no dimension of "
            f"model.embed_dim={model.embed_dim}",
        )


def _check_z_loss(config: Config) -> None:
    head = config.model.head
    normalized = AdaptiveHead | ClassVQHead | HierarchicalHead
    if config.train.z_loss and isinstance(head, normalized):
        _fail(
            "train.z_loss",
            config.train.z_loss,
            f"has no effect on model.head.kind={head.kind!r}, whose probabilities add up to one "
            "by construction; must be 0",
        )


def _check_codes(head: VQHead, vocab_size: int | None) -> None:
    if vocab_size is None:
        return
    if head.num_own_tokens >= vocab_size:
        _fail(
            "model.head.num_own_tokens",
            head.num_own_tokens,
            f"must be less than model.vocab_size={vocab_size}",
        )
    if head.num_codes > vocab_size - head.num_own_tokens:
        less = f" less model.head.num_own_tokens={head.num_own_tokens}"
        _fail(
            "model.head.num_codes",
            head.num_codes,
            f"must be at most model.vocab_size={vocab_size}{less if head.num_own_tokens else ''}",
        )


def check_vocab_size(model: Model, of_tokenizer: int) -> None:
    """Raises ConfigError if a vocabulary is given that has not room for a tokenizer's."""
    if model.vocab_size is not None and model.vocab_size < of_tokenizer:
        _fail(
            "model.vocab_size",
            model.vocab_size,
            f"must be at least the {of_tokenizer} tokens of the tokenizer",
        )


def _check_form(head: VQHead, embed_dim: int) -> None:
    if head.form == "product" and embed_dim % head.num_codebooks:
        _fail(
            "model.head.num_codebooks",
            head.num_codebooks,
            f"must divide model.embed_dim={embed_dim} for form='product'",
        )
    if head.num_codebooks > 1 and head.assignment in ("contiguous", "frequency"):
        _fail(
            "model.head.assignment",
            head.assignment,
            "must be 'random', 'cooccurrence' or 'file' for "
            f"model.head.num_codebooks={head.num_codebooks} (kept when only the kind changes)",
        )
    if head.tied and head.num_codebooks == 1:
        _fail("model.head.tied", True, "needs model.head.num_codebooks of 2 or more")
    if head.expand_vectors is not None and head.num_codebooks <= 2 and not head.token_scale:
        _fail(
            "model.head.expand_vectors",
            head.expand_vectors,
            "must be None with one or two codebooks without scales: their loss has a closed form",
        )
    if head.expand_vectors and head.logit_soft_cap is not None:
        _fail(
            "model.head.expand_vectors",
            head.expand_vectors,
            f"must be False or None with model.head.logit_soft_cap={head.logit_soft_cap}",
        )


def _check_learned(head: VQHead) -> None:
    if head.reassign_every is None and head.reassign_decay != VQHead.reassign_decay:
        _fail("model.head.reassign_decay", head.reassign_decay, "needs model.head.reassign_every")
    if head.learned_candidates is None:
        if not head.gumbel:
            _fail("model.head.gumbel", False, "needs model.head.learned_candidates")
        return
    name = "model.head.learned_candidates"
    if head.learned_candidates > head.num_codes:
        accepted = f"must be at most model.head.num_codes={head.num_codes}"
        _fail(name, head.learned_candidates, accepted)
    if head.logit_soft_cap is not None or head.expand_vectors is False:
        _fail(name, head.learned_candidates, "needs expanded vectors, which have no soft-cap")
    if head.reassign_every is not None:
        _fail(
            "model.head.reassign_every",
            head.reassign_every,
            f"must be None with {name}={head.learned_candidates}: one of them makes the map",
        )


def _check_token_map(head: VQHead) -> None:
    if head.assignment == "file":
        if not head.token_map:
            _fail(
                "model.head.token_map",
                head.token_map,
                "must be a file of `python -m vqcx_jax.maps` for assignment='file'",
            )
        return
    only_file = f"needs assignment='file', but model.head.assignment={head.assignment!r}"
    if head.token_map is not None:
        _fail("model.head.token_map", head.token_map, only_file)
    if head.code_init == "centroids" and head.assignment != "cooccurrence":
        accepted = f"needs assignment='cooccurrence' or 'file', not {head.assignment!r}"
        _fail("model.head.code_init", head.code_init, accepted)


def _check_data(data: Data) -> None:
    match data.dataset:
        case TextFiles(path=""):
            _fail("data.dataset.path", "", "must be a file, directory or glob of .txt or .jsonl")
        case TFDS(name=name, path=path) if bool(name) == bool(path):
            _fail(
                "data.dataset.name",
                name,
                f"exactly one of it and data.dataset.path={path!r} must be set",
            )
    match data.tokenizer:
        case JSONTokenizer(path=""):
            _fail("data.tokenizer.path", "", "must be a tokenizers JSON file")
        case SentencePieceTokenizer(path=""):
            _fail("data.tokenizer.path", "", "must be a SentencePiece .model file")


def _check_schedule(optimizer: Optimizer, steps: int) -> None:
    if optimizer.schedule == "constant":
        return
    if optimizer.warmup_steps >= steps:
        _fail(
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"must be less than train.steps={steps} for schedule={optimizer.schedule!r}",
        )
    decay_steps = round(optimizer.decay_fraction * steps)
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + decay_steps > steps:
        _fail(
            "optimizer.decay_fraction",
            optimizer.decay_fraction,
            f"must leave the first {optimizer.warmup_steps} of train.steps={steps} to the warm-up",
        )


def _check_sharding_rules(rules: ShardingRules) -> None:
    for rule in fields(rules):
        mesh_axes: MeshAxes = getattr(rules, rule.name)
        if len(set(mesh_axes)) < len(mesh_axes):
            _fail(f"sharding.{rule.name}", ",".join(mesh_axes), "must name each mesh axis once")
    for first, second in _WEIGHTS + _ACTIVATIONS:
        shared = set(getattr(rules, first)) & set(getattr(rules, second))
        if shared:
            other = ",".join(getattr(rules, first))
            _fail(
                f"sharding.{second}",
                ",".join(getattr(rules, second)),
                f"must not name {min(shared)!r}, which sharding.{first}={other!r} has: "
                "both are axes of one array",
            )


def _check_sequence(rules: ShardingRules, mesh: dict[MeshAxis, int]) -> None:
    if mesh["sequence"] > 1 and "sequence" not in rules.sequence:
        _fail("mesh.sequence", mesh["sequence"], "must be 1, or sharding.sequence=sequence be set")


def _check_sizes(config: Config, mesh: dict[MeshAxis, int]) -> None:
    model, rules = config.model, config.sharding
    batch_size, microbatches = config.data.batch_size, config.train.grad_accumulation
    if batch_size % microbatches:
        _fail(
            "data.batch_size",
            batch_size,
            f"must be divisible by train.grad_accumulation={microbatches}",
        )
    batch_shards = math.prod(mesh[axis] for axis in rules.batch)
    if batch_size // microbatches % batch_shards:
        _fail(
            "data.batch_size",
            batch_size,
            f"must be divisible by train.grad_accumulation={microbatches} times {batch_shards}, "
            f"the devices of sharding.batch={','.join(rules.batch)!r}",
        )
    sharded = [
        ("model.embed_dim", model.embed_dim, "embed"),
        ("model.num_heads", model.num_heads, "heads"),
        ("model.num_kv_heads", model.num_kv_heads, "heads"),
        ("model.mlp_dim", model.mlp_dim, "mlp"),
        ("data.seq_len", config.data.seq_len, "sequence"),
    ]
    if model.vocab_size is not None:
        sharded.append(("model.vocab_size", model.vocab_size, "vocab"))
    if isinstance(model.head, VQHead | ClassVQHead):
        sharded.append(("model.head.num_codes", model.head.num_codes, "codes"))
    if isinstance(model.head, LowRankHead):
        sharded.append(("model.head.rank", model.head.rank, "embed"))
    for field, size, logical_axis in sharded:
        mesh_axes: MeshAxes = getattr(rules, logical_axis)
        shards = math.prod(mesh[axis] for axis in mesh_axes)
        if size % shards:
            _fail(
                field,
                size,
                f"must be divisible by {shards}, the devices of "
                f"sharding.{logical_axis}={','.join(mesh_axes)!r}",
            )
