"""What is printed before the first step."""

from pathlib import Path

import jax
from tiny_run import random_state, tiny_config

from vqcx_jax.maps import describe
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training.setup import prepare
from vqcx_jax.training.summary import run_summary


def summary(directory: Path, **overrides: str) -> list[str]:
    setup = prepare(tiny_config(directory, **overrides), directory / "run", None)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    return run_summary(setup, random_state(setup), mesh).splitlines()


def test_new_run_describes_its_token_map(tmp_path: Path) -> None:
    lines = summary(tmp_path, model__head__token_bias="false")
    names = ["text", "model", "codes", "vectors", "bytes", "usage", "floor", "devices", "steps"]
    assert [line.split()[0] for line in lines] == names
    setup = prepare(tiny_config(tmp_path), tmp_path / "run", None)
    assert setup.token_map is not None and setup.token_counts is not None
    expected = describe(
        setup.token_map,
        embed_dim=16,
        counts=setup.token_counts,
        form="additive",
        token_bias=False,
        token_scale=False,
    )
    assert lines[2:7] == expected.splitlines()
    (floor,) = [line for line in summary(tmp_path) if line.startswith("floor ")]
    assert "would be tied without biases and scales" in floor


def test_classes_are_described(tmp_path: Path) -> None:
    head = {"kind": "class_vq", "num_codes": "8", "num_codebooks": "4", "token_scale": "true"}
    lines = summary(tmp_path, **{f"model__head__{name}": value for name, value in head.items()})
    names = ["text", "model", "codes", "vectors", "bytes", "usage", "classes", "floor"]
    assert [line.split()[0] for line in lines] == [*names, "devices", "steps"]
    assert lines[2].startswith("codes    4 x 8 a token, 12 bits: ")
    # Slices of 16 / 4 columns; a bias and a scale of 264 tokens and 65 classes.
    assert lines[3].startswith("vectors  128 parameters, ")
    assert lines[3].endswith(" with 658 biases and scales")
    # 264 - 65 tokens in 65 classes.
    assert lines[6] == "classes  65 of at most 4 tokens, beside 65 frequent ones"


def test_full_head_has_no_token_map(tmp_path: Path) -> None:
    lines = summary(tmp_path, model__head__kind="full")
    assert [line.split()[0] for line in lines] == ["text", "model", "devices", "steps"]
