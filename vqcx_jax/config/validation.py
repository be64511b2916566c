"""What the fields of a configuration must satisfy together."""

import math
from dataclasses import fields
from typing import NoReturn

from vqcx_jax.config.mesh import minimum_mesh_shape, resolve_mesh_shape
from vqcx_jax.config.schema import (
    TFDS,
    Config,
    Data,
    JSONTokenizer,
    MeshAxes,
    MeshAxis,
    Model,
    Optimizer,
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
_ACTIVATIONS = (("batch", "heads"), ("batch", "mlp"))


def validate(config: Config, device_count: int | None = None) -> Config:
    """Returns `config` unchanged if its fields fit together.

    Args:
      config: what to check.
      device_count: devices of all processes. None: a mesh axis of -1 may become any size.

    Raises:
      ConfigError: names the field, its value and what is accepted.
    """
    _check_model(config.model)
    _check_data(config.data)
    _check_schedule(config.optimizer, config.train.steps)
    _check_sharding_rules(config.sharding)
    if device_count is None:
        _check_sizes(config, minimum_mesh_shape(config.mesh))
    else:
        _check_sizes(config, resolve_mesh_shape(config.mesh, device_count))
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
    if isinstance(model.head, VQHead):
        _check_codes(model.head, model.vocab_size)


def _check_codes(head: VQHead, vocab_size: int | None) -> None:
    if vocab_size is not None and head.num_codes > vocab_size:
        _fail(
            "model.head.num_codes", head.num_codes, f"must be at most model.vocab_size={vocab_size}"
        )
    if head.assignment == "kmeans":
        if not head.vectors:
            _fail(
                "model.head.vectors",
                head.vectors,
                "must be an .npy file with one vector per token for assignment='kmeans'",
            )
        return
    only_kmeans = f"needs assignment='kmeans', but model.head.assignment={head.assignment!r}"
    if head.vectors is not None:
        _fail("model.head.vectors", head.vectors, only_kmeans)
    if head.code_init == "centroids":
        _fail("model.head.code_init", head.code_init, only_kmeans)


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
    ]
    if model.vocab_size is not None:
        sharded.append(("model.vocab_size", model.vocab_size, "vocab"))
    if isinstance(model.head, VQHead):
        sharded.append(("model.head.num_codes", model.head.num_codes, "codes"))
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
