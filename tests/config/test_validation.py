"""Combinations of fields: what fits passes unchanged, what cannot work is named in one line."""

import pytest

from vqcx_jax.config import Config, apply_overrides, validate
from vqcx_jax.errors import ConfigError

KMEANS = {"model.head.assignment": "kmeans", "model.head.vectors": "v.npy"}
TFDS = {"data.dataset.kind": "tfds"}
TENSOR_4 = {"mesh.data": "1", "mesh.tensor": "4"}
FSDP_4 = {"mesh.data": "1", "mesh.fsdp": "4"}


def make(**overrides: str) -> Config:
    return apply_overrides(Config(), list(overrides.items()))


@pytest.mark.parametrize(
    ("overrides", "device_count"),
    [
        ({}, None),
        ({}, 1),
        ({}, 8),
        (KMEANS, 1),
        (KMEANS | {"model.head.code_init": "centroids"}, 1),
        (TFDS | {"data.dataset.name": "c4/en"}, 1),
        (TFDS | {"data.dataset.path": "/c4"}, 1),
        ({"data.dataset.kind": "wikitext103"}, 1),
        ({"data.tokenizer.kind": "json", "data.tokenizer.path": "t.json"}, 1),
        ({"model.num_heads": "8", "model.num_kv_heads": "2"}, 1),
        ({"model.vocab_size": "512"}, 1),
        ({"model.vocab_size": "100", "model.head.kind": "full"}, 1),
        ({"optimizer.schedule": "constant", "train.steps": "10"}, 1),
        ({"optimizer.schedule": "wsd", "optimizer.warmup_steps": "240"}, 1),
        ({"train.grad_accumulation": "4"}, 4),
        (TENSOR_4 | {"model.vocab_size": "4096"}, 4),
        (FSDP_4 | {"sharding.codes": "tensor"}, 4),
        # Nothing here divides by 3, but nothing is sharded over three devices.
        (
            {"mesh.data": "1", "mesh.tensor": "3"}
            | dict.fromkeys(["sharding.vocab", "sharding.heads", "sharding.mlp"], ""),
            3,
        ),
    ],
)
def test_valid(overrides: dict[str, str], device_count: int | None) -> None:
    config = make(**overrides)
    assert validate(config, device_count) is config


@pytest.mark.parametrize(
    ("overrides", "device_count", "parts"),
    [
        ({"model.head_dim": "33"}, None, ["model.head_dim=33: must be even"]),
        (
            {"model.head_dim": "33", "model.attention.kind": "rope"},
            None,
            ["model.head_dim=33: must be even"],
        ),
        (
            {"model.num_heads": "4", "model.num_kv_heads": "3"},
            None,
            ["model.num_kv_heads=3: must divide model.num_heads=4"],
        ),
        (
            {"model.vocab_size": "511"},
            None,
            ["model.head.num_codes=512: must be at most model.vocab_size=511"],
        ),
        ({"model.head.assignment": "kmeans"}, None, ["model.head.vectors=None: must be an .npy"]),
        (KMEANS | {"model.head.vectors": ""}, None, ["model.head.vectors='': must be an .npy"]),
        (
            {"model.head.vectors": "v.npy"},
            None,
            ["model.head.vectors='v.npy': needs assignment='kmeans'", "assignment='frequency'"],
        ),
        (
            {"model.head.code_init": "centroids"},
            None,
            ["model.head.code_init='centroids': needs assignment='kmeans'"],
        ),
        ({"data.dataset.kind": "text_files"}, None, ["data.dataset.path='': must be a file"]),
        (TFDS, None, ["data.dataset.name=None: exactly one of", "data.dataset.path=None"]),
        (
            TFDS | {"data.dataset.name": "c4", "data.dataset.path": "/c4"},
            None,
            ["data.dataset.name='c4': exactly one of", "data.dataset.path='/c4'"],
        ),
        ({"data.tokenizer.kind": "json"}, None, ["data.tokenizer.path='': must be a", "JSON"]),
        ({"data.tokenizer.kind": "sentencepiece"}, None, ["data.tokenizer.path=''", ".model"]),
        (
            {"train.steps": "50"},
            None,
            ["optimizer.warmup_steps=50: must be less than train.steps=50", "'cosine'"],
        ),
        (
            {"train.steps": "50", "optimizer.schedule": "wsd"},
            None,
            ["optimizer.warmup_steps=50: must be less than train.steps=50", "'wsd'"],
        ),
        (
            {"optimizer.schedule": "wsd", "optimizer.warmup_steps": "241"},
            None,
            ["optimizer.decay_fraction=0.2:", "241", "train.steps=300"],
        ),
        (
            {"train.grad_accumulation": "3"},
            None,
            ["data.batch_size=16: must be divisible by train.grad_accumulation=3"],
        ),
        (
            {"train.grad_accumulation": "4"},
            8,
            ["data.batch_size=16: must be divisible by train.grad_accumulation=4 times 8", "fsdp"],
        ),
        ({"mesh.fsdp": "3"}, None, ["data.batch_size=16: must be divisible by", "3"]),
        (
            {"sharding.batch": "data,data"},
            None,
            ["sharding.batch='data,data': must name each mesh axis once"],
        ),
        (
            {"sharding.vocab": "fsdp"},
            None,
            ["sharding.embed='fsdp': must not name 'fsdp', which sharding.vocab='fsdp' has"],
        ),
        ({"sharding.codes": "tensor,fsdp"}, None, ["sharding.embed='fsdp'", "sharding.codes="]),
        ({"sharding.heads": "fsdp"}, None, ["sharding.heads='fsdp'", "sharding.embed='fsdp'"]),
        ({"sharding.mlp": "fsdp"}, None, ["sharding.mlp='fsdp'", "sharding.embed='fsdp'"]),
        ({"sharding.batch": "tensor"}, None, ["sharding.heads='tensor'", "sharding.batch='ten"]),
        (FSDP_4 | {"model.embed_dim": "258"}, 4, ["model.embed_dim=258: must be divisible by 4"]),
        (
            TENSOR_4 | {"model.num_heads": "6", "model.num_kv_heads": "6"},
            4,
            ["model.num_heads=6: must be divisible by 4, the devices of sharding.heads='tensor'"],
        ),
        (TENSOR_4 | {"model.num_kv_heads": "2"}, 4, ["model.num_kv_heads=2: must be divisible"]),
        (TENSOR_4 | {"model.mlp_dim": "702"}, 4, ["model.mlp_dim=702: must be divisible by 4"]),
        (TENSOR_4 | {"model.vocab_size": "4098"}, 4, ["model.vocab_size=4098: must be divisible"]),
        (
            TENSOR_4 | {"sharding.codes": "tensor", "model.head.num_codes": "510"},
            4,
            ["model.head.num_codes=510: must be divisible by 4, the devices of sharding.codes"],
        ),
        ({"mesh.data": "2"}, 8, ["mesh.data=2", "8"]),
        ({"mesh.data": "0"}, None, ["mesh.data=0: must be at least 1"]),
        ({"mesh.fsdp": "-1"}, None, ["mesh.fsdp=-1: only one axis may be -1"]),
    ],
)
def test_messages(overrides: dict[str, str], device_count: int | None, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(make(**overrides), device_count)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
