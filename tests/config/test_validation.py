"""Combinations of fields: what fits passes unchanged, what cannot work is named in one line."""

from typing import Any

import pytest

from vqcx_jax.config import Config, apply_overrides, schema, validate
from vqcx_jax.errors import ConfigError

FROM_FILE = {"model.head.assignment": "file", "model.head.token_map": "map.npz"}
TWO_RANDOM = {"model.head.num_codebooks": "2", "model.head.assignment": "random"}
OWN_500 = {"model.head.num_own_tokens": "500"}
CLASSES = {"model.head.kind": "class_vq", "model.head.num_codes": "256"}
TFDS = {"data.dataset.kind": "tfds"}
TENSOR_4 = {"mesh.data": "1", "mesh.tensor": "4"}
FSDP_4 = {"mesh.data": "1", "mesh.fsdp": "4"}
SEQUENCE_4 = {"mesh.data": "1", "mesh.sequence": "4"}
BY_SEQUENCE = {"sharding.sequence": "sequence"}
YARN = {"model.attention.extension": "yarn", "model.attention.extension_factor": "2.0"}


def make(**overrides: str) -> Config:
    return apply_overrides(Config(), list(overrides.items()))


@pytest.mark.parametrize(
    ("overrides", "device_count"),
    [
        ({}, None),
        ({}, 1),
        ({}, 8),
        (FROM_FILE, 1),
        (FROM_FILE | {"model.head.code_init": "centroids"}, 1),
        (FROM_FILE | {"model.head.num_codebooks": "16", "model.head.form": "product"}, 1),
        (TWO_RANDOM | {"model.head.form": "product", "model.head.token_scale": "true"}, 1),
        (TWO_RANDOM | {"model.head.num_codebooks": "7"}, 1),  # Additive: 7 need not divide 256.
        ({"model.vocab_size": "512", "model.head.num_codes": "12", **OWN_500}, 1),
        ({"model.head.reassign_every": "100"}, 1),
        (TWO_RANDOM | {"model.head.reassign_every": "1", "model.head.tied": "true"}, 1),
        (TFDS | {"data.dataset.name": "c4/en"}, 1),
        (TFDS | {"data.dataset.path": "/c4"}, 1),
        ({"data.dataset.kind": "wikitext103"}, 1),
        ({"data.tokenizer.kind": "json", "data.tokenizer.path": "t.json"}, 1),
        ({"model.num_heads": "8", "model.num_kv_heads": "2"}, 1),
        ({"model.vocab_size": "512"}, 1),
        ({"model.vocab_size": "100", "model.head.kind": "full"}, 1),
        ({"model.head.kind": "full", "model.head.tied": "true", "train.z_loss": "0.1"}, 1),
        ({"model.head.kind": "low_rank", "model.head.rank": "256"}, 1),
        ({"model.head.kind": "adaptive", "model.vocab_size": "2049"}, 1),
        ({"model.head.kind": "hierarchical", "model.vocab_size": "7"}, 1),
        (CLASSES, 1),
        (CLASSES | {"model.vocab_size": "259", "model.head.num_frequent": "0"}, 1),
        # A size that is not given makes room.
        (CLASSES | {"model.vocab_size": "259", "model.head.num_frequent": "258"}, 1),
        (CLASSES | {"model.vocab_size": "259", "model.head.num_classes": "259"}, 1),
        (CLASSES | FROM_FILE, 1),
        (CLASSES | {"model.head.tied": "true"}, 1),
        (CLASSES | {"model.head.assignment": "random", "model.head.code_init": "random"}, 1),
        ({"optimizer.schedule": "constant", "train.steps": "10"}, 1),
        ({"optimizer.schedule": "wsd", "optimizer.warmup_steps": "240"}, 1),
        ({"train.grad_accumulation": "4"}, 4),
        (TENSOR_4 | {"model.vocab_size": "4096"}, 4),
        (FSDP_4 | {"sharding.codes": "tensor"}, 4),
        (SEQUENCE_4 | BY_SEQUENCE, 4),
        (BY_SEQUENCE | {"data.seq_len": "7"}, 1),
        (YARN | {"model.attention.trained_length": "64"}, 1),
        (YARN | {"model.attention.extension": "ntk", "model.attention.kind": "smooth"}, 1),
        ({"model.attention.kind": "alibi", "model.attention.window": "4"}, 1),
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
            {"model.attention.extension_factor": "2.0"},
            None,
            ["model.attention.extension_factor=2.0: must be 1 with model.attention.extension='no"],
        ),
        *(
            (
                {"model.attention.trained_length": "64", "model.attention.extension": extension},
                None,
                ["model.attention.trained_length=64: must be None", f"{extension!r}, for 'yarn'"],
            )
            for extension in ("none", "linear", "ntk")
        ),
        (
            YARN | {"model.attention.kind": "harmonic"},
            None,
            ["model.attention.trained_length=None: must be the positions of training", "'yarn'"],
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
        (
            OWN_500 | {"model.vocab_size": "500", "model.head.num_codes": "1"},
            None,
            ["model.head.num_own_tokens=500: must be less than model.vocab_size=500"],
        ),
        (
            OWN_500 | {"model.vocab_size": "512", "model.head.num_codes": "13"},
            None,
            ["model.head.num_codes=13: must be at most model.vocab_size=512 less", "tokens=500"],
        ),
        (
            TWO_RANDOM | {"model.head.num_codebooks": "7", "model.head.form": "product"},
            None,
            ["model.head.num_codebooks=7: must divide model.embed_dim=256 for form='product'"],
        ),
        (
            {"model.head.num_codebooks": "2"},
            None,
            [
                "model.head.assignment='frequency': must be 'random', 'cooccurrence' or 'file' for",
                "codebooks=2",
            ],
        ),
        (
            TWO_RANDOM | {"model.head.assignment": "contiguous"},
            None,
            ["model.head.assignment='contiguous': must be 'random', 'cooccurrence' or 'file'"],
        ),
        (
            {"model.head.reassign_every": "9", "model.head.learned_candidates": "4"},
            None,
            ["model.head.reassign_every=9: must be None with model.head.learned_candidates=4"],
        ),
        (
            {"model.head.reassign_decay": "0.5"},
            None,
            ["model.head.reassign_decay=0.5: needs model.head.reassign_every"],
        ),
        (
            {"model.head.gumbel": "false"},
            None,
            ["model.head.gumbel=False: needs model.head.learned_candidates"],
        ),
        (
            {"model.head.assignment": "file"},
            None,
            ["model.head.token_map=None: must be a file of `python -m vqcx_jax.maps`"],
        ),
        (
            FROM_FILE | {"model.head.token_map": ""},
            None,
            ["model.head.token_map='': must be a file"],
        ),
        (
            {"model.head.token_map": "map.npz"},
            None,
            ["model.head.token_map='map.npz': needs assignment='file'", "assignment='frequency'"],
        ),
        (
            {"model.head.code_init": "centroids"},
            None,
            ["model.head.code_init='centroids': needs assignment='cooccurrence' or 'file'"],
        ),
        (
            {"model.head.kind": "low_rank", "model.head.rank": "257"},
            None,
            ["model.head.rank=257: must be at most model.embed_dim=256"],
        ),
        (
            FSDP_4 | {"model.head.kind": "low_rank", "model.head.rank": "30"},
            4,
            ["model.head.rank=30: must be divisible by 4, the devices of sharding.embed='fsdp'"],
        ),
        (
            {"model.head.kind": "adaptive", "model.head.cutoffs": "20,20"},
            None,
            ["model.head.cutoffs='20,20': must be one or more rising numbers"],
        ),
        (
            {"model.head.kind": "adaptive", "model.head.cutoffs": ""},
            None,
            ["model.head.cutoffs='': must be one or more rising numbers"],
        ),
        (
            {"model.head.kind": "adaptive", "model.vocab_size": "2048"},
            None,
            ["model.head.cutoffs='512,2048': must end below model.vocab_size=2048"],
        ),
        (
            {"model.head.kind": "adaptive", "model.head.div_value": "17.0"},
            None,
            ["model.head.div_value=17.0: leaves the last of 2 clusters no dimension of", "256"],
        ),
        (
            {"model.head.kind": "adaptive", "train.z_loss": "0.1"},
            None,
            ["train.z_loss=0.1: has no effect on model.head.kind='adaptive'", "must be 0"],
        ),
        (
            {"model.head.kind": "hierarchical", "train.z_loss": "0.1"},
            None,
            ["train.z_loss=0.1: has no effect on model.head.kind='hierarchical'"],
        ),
        (
            CLASSES | {"model.vocab_size": "300", "model.head.num_frequent": "300"},
            None,
            ["model.head.num_frequent=300: must be less than model.vocab_size=300"],
        ),
        (
            CLASSES | {"model.vocab_size": "300", "model.head.num_classes": "301"},
            None,
            ["model.head.num_classes=301: must be at most model.vocab_size=300 less"],
        ),
        (
            CLASSES
            | {"model.vocab_size": "300"}
            | {"model.head.num_classes": "201", "model.head.num_frequent": "100"},
            None,
            ["model.head.num_classes=201: must be at most", "300 less model.head.num_frequent=100"],
        ),
        *(
            (
                {"model.head.kind": kind, "model.head.bias_init": "counts"}
                | {"model.head.token_bias": "false"},
                None,
                ["model.head.bias_init='counts': needs model.head.token_bias=true"],
            )
            for kind in ("vq", "class_vq", "full", "low_rank")
        ),
        (
            CLASSES | {"model.vocab_size": "255"},
            None,
            ["model.head.num_codes=256: must be at most model.vocab_size=255"],
        ),
        (
            CLASSES | {"model.head.num_codebooks": "7"},
            None,
            ["model.head.num_codebooks=7: must divide model.embed_dim=256"],
        ),
        (
            CLASSES | {"model.head.num_codebooks": "1", "model.head.tied": "true"},
            None,
            ["model.head.tied=True: needs model.head.num_codebooks of 2 or more"],
        ),
        (
            CLASSES | {"train.z_loss": "0.1"},
            None,
            ["train.z_loss=0.1: has no effect on model.head.kind='class_vq'", "must be 0"],
        ),
        (
            CLASSES | {"model.head.token_map": "map.npz"},
            None,
            ["model.head.token_map='map.npz': needs assignment='file'", "='cooccurrence'"],
        ),
        (
            CLASSES | {"model.head.assignment": "file"},
            None,
            ["model.head.token_map=None: must be a file of `python -m vqcx_jax.maps`"],
        ),
        (
            CLASSES | {"model.head.assignment": "random"},
            None,
            ["model.head.code_init='centroids': needs assignment='cooccurrence' or 'file'"],
        ),
        (
            CLASSES | {"model.head.assignment": "frequency"},
            None,
            ["model.head.assignment='frequency': must be 'random', 'cooccurrence' or 'file'"],
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
        (
            TENSOR_4 | CLASSES | {"sharding.codes": "tensor", "model.head.num_codes": "254"},
            4,
            ["model.head.num_codes=254: must be divisible by 4, the devices of sharding.codes"],
        ),
        *(
            (
                SEQUENCE_4,
                count,
                ["mesh.sequence=4: must be 1, or sharding.sequence=sequence be set"],
            )
            for count in (None, 4)
        ),
        (
            SEQUENCE_4 | BY_SEQUENCE | {"data.seq_len": "126"},
            4,
            ["data.seq_len=126: must be divisible by 4, the devices of sharding.sequence='sequen"],
        ),
        (
            {"sharding.sequence": "data"},
            None,
            ["sharding.sequence='data': must not name 'data', which sharding.batch='data,fsdp'"],
        ),
        (
            {"sharding.sequence": "tensor"},
            None,
            ["sharding.heads='tensor': must not name 'tensor', which sharding.sequence='tensor'"],
        ),
        (
            {"model.attention.extension": "linear"},
            None,
            ["model.attention.extension_factor=1.0: must be above 1", "extension='linear'"],
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


@pytest.mark.parametrize(
    "given", [{}, {"num_classes": 1}, {"num_frequent": 0}, {"num_frequent": 1}], ids=str
)
def test_classes_divide_every_vocabulary(given: Any) -> None:
    for vocab_size in [*range(2, 130), 259, 1000, 50_000]:
        head = schema.ClassVQHead(num_codes=1, **given)
        num_classes, num_frequent, num_ranks = head.sizes(vocab_size)
        assert num_classes >= 1 and num_frequent >= 0
        in_classes = vocab_size - num_frequent
        assert num_classes <= in_classes <= num_classes * num_ranks
        assert in_classes > num_classes * (num_ranks - 1)
        config = Config(model=schema.Model(vocab_size=vocab_size, head=head))
        assert validate(config) is config


def test_usual_classes() -> None:
    assert schema.ClassVQHead().sizes(10_000) == (400, 400, 24)
    assert schema.ClassVQHead(num_classes=100).sizes(10_000) == (100, 400, 96)
    assert schema.ClassVQHead(num_frequent=0).sizes(10_000) == (400, 0, 25)
    assert schema.ClassVQHead().sizes(7) == (3, 3, 2)
    assert schema.ClassVQHead().sizes(1) == (1, 0, 1)
    assert schema.ClassVQHead(num_classes=7).sizes(7) == (7, 0, 1)
    assert schema.ClassVQHead(num_frequent=6).sizes(7) == (1, 6, 1)
