"""The files of configs/: they load, they fit together, and their docstrings tell the truth."""

import re
from pathlib import Path

import pytest

from vqcx_jax.config import from_json, load_config, schema, to_json, validate

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
UNITS = {"M": 1e6, "B": 1e9}


def test_all_are_found() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"quickstart", "wikitext2", "wikitext103", "c4", "ladder_30m", "ladder_8b"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("device_count", [None, 1, 8])
def test_valid(path: Path, device_count: int | None) -> None:
    validate(load_config(path), device_count)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_round_trip(path: Path) -> None:
    config = load_config(path)
    assert from_json(to_json(config)) == config


def trunk_parameters(model: schema.Model) -> int:
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim * model.embed_dim
    assert isinstance(model.attention, schema.PopeAttention)
    phases = model.num_heads * model.head_dim
    mlp = 3 * model.embed_dim * model.mlp_dim
    norms = 2 * model.embed_dim
    return model.num_layers * (attention + phases + mlp + norms) + model.embed_dim


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_counts(path: Path) -> None:
    config, text = load_config(path), path.read_text()
    tokenizer = config.data.tokenizer
    vocab_size = tokenizer.vocab_size if isinstance(tokenizer, schema.BPETokenizer) else 33_278
    assert isinstance(config.model.head, schema.VQHead | schema.ClassVQHead)
    counts = {
        "Trunk": trunk_parameters(config.model),
        "input embedding": vocab_size * config.model.embed_dim,
        "codebook": config.model.head.num_codes * config.model.embed_dim,
    }
    for name, count in counts.items():
        match = re.search(rf"{name} ([\d.]+)([MB])", text)
        assert match, name
        digits = len(match[1].partition(".")[2])
        assert round(count / UNITS[match[2]], digits) == float(match[1]), (name, count)


@pytest.mark.parametrize("path", [p for p in CONFIGS if "ladder" in p.stem], ids=lambda p: p.stem)
def test_ladder_trains_on_twenty_tokens_per_parameter(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config.data.tokenizer, schema.BPETokenizer)
    embedding = config.data.tokenizer.vocab_size * config.model.embed_dim
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    assert 18 < tokens / (trunk_parameters(config.model) + embedding) < 24
