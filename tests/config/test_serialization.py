"""JSON: nothing is lost, and nothing wrong is let in."""

import json
from typing import Any

import pytest

from vqcx_jax.config import Config, from_json, schema, to_json
from vqcx_jax.errors import ConfigError

ATTENTIONS: list[Any] = [
    schema.ComplexAttention(delta_init="published", scaled=False, frequencies="per_head"),
    schema.SmoothAttention(extension="yarn", extension_factor=2.0, trained_length=64),
    schema.HarmonicAttention(num_harmonics=3, learned_frequencies=True),
    schema.EulerFormerAttention(share_planes=False, extension="ntk"),
    schema.AmplitudeAttention(rope_base=5e5),
    schema.RopeAttention(rope_fraction=0.75, qk_norm=True),
    schema.PopeAttention(rope_base=5e5, logit_soft_cap=3.0),
    schema.AlibiAttention(window=7),
    schema.NopeAttention(window=7),
]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_round_trip_through_json_text(attention: Any) -> None:
    config = Config(
        model=schema.Model(
            vocab_size=257, attention=attention, head=schema.FullHead(token_bias=True)
        ),
        data=schema.Data(dataset=schema.WikiText(kind="wikitext103", path="/there")),
        sharding=schema.ShardingRules(batch=("data",), sequence=("sequence",), embed=()),
    )
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_every_field_is_written() -> None:
    fields = to_json(Config())
    assert fields["model"]["vocab_size"] is None
    assert fields["model"]["head"]["kind"] == "vq"
    assert fields["sharding"]["batch"] == ["data", "fsdp"]


def test_left_out_fields_have_their_defaults() -> None:
    assert from_json({}) == Config()
    assert from_json({"train": {"steps": 7}}) == Config(train=schema.Training(steps=7))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"modle": {}}, ["modle: no such field (did you mean model?)", "accepts model, data"]),
        ({"model": {"num_layer": 1}}, ["model.num_layer:", "mean model.num_layers?"]),
        (
            {"model": {"head": {"kind": "vq", "num_code": 1}}},
            ["model.head.num_code:", "mean model.head.num_codes?", "model.head accepts kind, "],
        ),
        (
            {"data": {"dataset": {"kind": "wikitext103", "name": "c4"}}},
            ["data.dataset.name: no such field with this data.dataset.kind (only with tfds)"],
        ),
        ({"model": {"num_layers": "3"}}, ["model.num_layers='3': must be a valid integer"]),
        ({"model": {"num_layers": True}}, ["model.num_layers=True: must be a valid integer"]),
        ({"model": {"num_layers": 0}}, ["model.num_layers=0: must be greater than or equal to 1"]),
        ({"train": {"steps": None}}, ["train.steps=None: must be a valid integer"]),
        ({"train": {"peak_flops": -1}}, ["train.peak_flops=-1: must be greater than 0, or none"]),
        ({"model": 3}, ["model=3: must be a Model"]),
        ({"model": {"head": 3}}, ["model.head=3: must be a VQHead"]),
        ({"model": {"head": {"num_codes": 3}}}, ["model.head.kind: missing", "'vq', "]),
        ({"model": {"head": {"kind": "x"}}}, ["model.head.kind='x': must be one of 'vq', "]),
        (
            {"model": {"attention": {"kind": "alibi", "rope_base": 1e4}}},
            ["model.attention.rope_base: no such field with this model.attention.kind (only with "],
        ),
        (
            {"model": {"attention": {"kind": "harmonic", "num_harmonics": 1}}},
            ["model.attention.num_harmonics=1: must be greater than or equal to 2"],
        ),
        (
            {"model": {"attention": {"kind": "rope", "rope_fraction": 0.0}}},
            ["model.attention.rope_fraction=0.0: must be greater than 0"],
        ),
        (
            {"model": {"attention": {"kind": "rope", "window": 0}}},
            ["model.attention.window=0: must be greater than or equal to 1, or none"],
        ),
        ({"sharding": {"batch": ["pipe"]}}, ["sharding.batch='pipe': must be 'data', 'fsdp', "]),
        ({"sharding": {"batch": "data"}}, ["sharding.batch='data': must be a valid"]),
        ([], ["the configuration=[]: must be a Config"]),
    ],
)
def test_messages(fields: Any, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(fields)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
