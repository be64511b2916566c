"""Overrides: every field can be set, and every mistake is one line that helps."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from vqcx_jax.config import Config, apply_overrides, schema
from vqcx_jax.errors import ConfigError


def leaves(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of every plain field of a configuration."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def as_typed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def other(value: Any) -> Any:
    """A value of the same type that is not the default, for the fields that are no choice."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 300
    if isinstance(value, float):
        return value / 2
    return value


DATASETS = [schema.PythonStdlib, schema.TextFiles, schema.WikiText, schema.TFDS]
TOKENIZERS = [
    schema.BytesTokenizer,
    schema.WordTokenizer,
    schema.BPETokenizer,
    schema.JSONTokenizer,
    schema.SentencePieceTokenizer,
]
ATTENTIONS: list[Any] = [
    schema.SmoothAttention,
    schema.HarmonicAttention,
    schema.EulerFormerAttention,
    schema.AmplitudeAttention,
    schema.RopeAttention,
    schema.PopeAttention,
    schema.AlibiAttention,
    schema.NopeAttention,
]
BASELINES: list[Any] = [schema.LowRankHead, schema.AdaptiveHead, schema.HierarchicalHead]
CONFIGS = [
    Config(),
    Config(model=schema.Model(attention=schema.RopeAttention(), head=schema.FullHead())),
    *(Config(model=schema.Model(attention=attention())) for attention in ATTENTIONS),
    *(Config(model=schema.Model(head=head())) for head in BASELINES),
    *(Config(data=schema.Data(dataset=dataset())) for dataset in DATASETS),
    *(Config(data=schema.Data(tokenizer=tokenizer())) for tokenizer in TOKENIZERS),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_takes_its_own_value_as_text(config: Config) -> None:
    for path, value in leaves(config):
        assert apply_overrides(config, [(path, as_typed(value))]) == config, path


def test_every_number_and_switch_can_be_changed() -> None:
    for path, value in leaves(Config()):
        changed_value = 2.0 if path.endswith("extension_factor") else other(value)
        changed = apply_overrides(Config(), [(path, as_typed(changed_value))])
        assert dict(leaves(changed)) == dict(leaves(Config())) | {path: changed_value}


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("model.vocab_size", "50257", 50257),
        ("optimizer.clip_norm", "none", None),
        ("optimizer.clip_norm", "Null", None),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("model.head.token_bias", "false", False),
        ("model.remat", "none", "none"),
        ("mesh.data", "-1", -1),
        ("sharding.batch", "data", ("data",)),
        ("sharding.batch", "data, fsdp,tensor", ("data", "fsdp", "tensor")),
        ("sharding.batch", "", ()),
        ("train.sample_prompt", "", ""),
        ("train.sample_prompt", "a = b, c", "a = b, c"),
    ],
)
def test_values(path: str, text: str, expected: object) -> None:
    assert dict(leaves(apply_overrides(Config(), [(path, text)])))[path] == expected


def test_the_last_override_of_a_field_wins() -> None:
    config = apply_overrides(Config(), [("train.steps", "1"), ("train.steps", "2")])
    assert config.train.steps == 2
    config = apply_overrides(Config(), [("model.head.kind", "full"), ("model.head.kind", "vq")])
    assert isinstance(config.model.head, schema.VQHead)


def test_the_given_config_is_not_changed() -> None:
    config = Config()
    apply_overrides(config, [("model.head.kind", "full"), ("train.steps", "7")])
    assert config == Config()


def test_a_kind_keeps_shared_fields_and_takes_defaults_for_the_others() -> None:
    config = Config(model=schema.Model(attention=schema.ComplexAttention(rope_base=5e5)))
    config = apply_overrides(config, [("model.attention.kind", "rope")])
    assert config.model.attention == schema.RopeAttention(rope_base=5e5)
    config = apply_overrides(config, [("model.attention.kind", "complex")])
    assert config.model.attention == schema.ComplexAttention(rope_base=5e5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_kind_of_attention_by_name(attention: Any) -> None:
    """Options stay; what only frequencies have is gone where there are none."""
    options = schema.ComplexAttention(window=7, logit_soft_cap=3.0, qk_norm=True, rope_base=5e5)
    config = Config(model=schema.Model(attention=options))
    config = apply_overrides(config, [("model.attention.kind", attention.kind)])
    kept = {"window": 7, "logit_soft_cap": 3.0, "qk_norm": True}
    has_base = attention not in (schema.AlibiAttention, schema.NopeAttention)
    expected = attention(**kept | ({"rope_base": 5e5} if has_base else {}))
    assert config.model.attention == expected


def test_a_field_of_another_type_is_not_carried_over() -> None:
    config = Config(data=schema.Data(dataset=schema.TFDS(path=None, text_field="body")))
    config = apply_overrides(config, [("data.dataset.kind", "text_files")])
    assert config.data.dataset == schema.TextFiles(text_field="body")


def test_kinds_of_one_class_keep_every_field() -> None:
    config = Config(data=schema.Data(dataset=schema.WikiText(path="/there")))
    config = apply_overrides(config, [("data.dataset.kind", "wikitext103")])
    assert config.data.dataset == schema.WikiText(kind="wikitext103", path="/there")


def test_kinds_are_applied_before_other_fields() -> None:
    config = apply_overrides(
        Config(),
        [("data.dataset.path", "a.txt"), ("data.dataset.kind", "text_files")],
    )
    assert config.data.dataset == schema.TextFiles(path="a.txt")


@pytest.mark.parametrize(
    ("path", "text", "parts"),
    [
        (
            "model.head.num_code",
            "8",
            ["model.head.num_code:", "mean model.head.num_codes?", "accepts kind, num_codes, "],
        ),
        ("modle.num_layers", "8", ["modle.num_layers:", "mean model.num_layers?", "model, data"]),
        ("train.learning_rate", "1", ["mean optimizer.learning_rate?", "train accepts steps, "]),
        ("xyzzy", "1", ["xyzzy: no such field; the configuration accepts model, data, optimizer"]),
        ("", "1", ["no such field", "accepts model"]),
        ("model.", "1", ["model.: no such field", "model accepts vocab_size"]),
        (
            "data.tokenizer.max_vocab_size",
            "9",
            ["no such field with this data.tokenizer.kind (only with word)", "train_documents"],
        ),
        ("model.num_layers.x", "1", ["model.num_layers.x:", "model.num_layers is a value"]),
        ("model.num_layers", "three", ["model.num_layers='three': must be a valid integer"]),
        ("model.num_layers", "none", ["model.num_layers='none': must be a valid integer"]),
        ("model.num_layers", "1.5", ["model.num_layers='1.5': must be a valid integer"]),
        ("model.num_layers", "9" * 5000, ["model.num_layers='999", "fewer digits"]),
        ("model.num_layers", "0", ["model.num_layers='0': must be greater than or equal to 1"]),
        ("model.vocab_size", "x", ["model.vocab_size='x': must be a valid integer, or none"]),
        ("optimizer.learning_rate", "nan", ["optimizer.learning_rate='nan': must be "]),
        ("optimizer.beta2", "1", ["optimizer.beta2='1': must be less than 1"]),
        ("model.dtype", "fp8", ["model.dtype='fp8': must be 'float32' or 'bfloat16'"]),
        ("model.head.token_bias", "maybe", ["token_bias='maybe': must be a valid boolean"]),
        (
            "sharding.batch",
            "data,pipe",
            ["sharding.batch='data,pipe': each must be 'data'", "'fsdp'"],
        ),
        ("sharding.batch", "none", ["sharding.batch='none': each must be 'data'", "'fsdp'"]),
        ("model.head.kind", "tied", ["model.head.kind='tied': must be one of 'vq', "]),
        ("model.kind", "vq", ["model.kind: no such field"]),
        (
            "model.head",
            "full",
            ["model.head='full': is a section", "kind, num_codes", "with model.head.kind"],
        ),
        ("train", "3\n4", ["train='3\\n4': is a section", "steps, seed"]),
    ],
)
def test_messages(path: str, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Config(), [(path, text)])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_default_of_the_old_kind_does_not_hide_one_of_the_new() -> None:
    config = Config(model=schema.Model(head=schema.VQHead(num_codes=64)))
    config = apply_overrides(config, [("model.head.kind", "class_vq")])
    assert config.model.head == schema.ClassVQHead(num_codes=64)
