"""The map of a run: what its model has looked up last, and what a new run can begin with."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grain import MapDataset
from tiny_run import tiny_config, tiny_optimizer
from versions import oldest_jax

from vqcx_jax.config import apply_overrides, schema
from vqcx_jax.data import tokenizer_fingerprint
from vqcx_jax.errors import CheckpointError, DataError, UserError
from vqcx_jax.maps import TokenMap, __main__
from vqcx_jax.maps.run_map import run_map
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import build_model
from vqcx_jax.nn.heads import ClassVQHead
from vqcx_jax.ops.codebook import classes
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training import loop
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.setup import Setup, prepare
from vqcx_jax.training.state import TrainState

pytestmark = oldest_jax

PRODUCT = {"num_codes": "8", "num_codebooks": "4", "form": "product", "assignment": "random"}
LEARNED = {**PRODUCT, "learned_candidates": "3", "token_scale": "true"}
REASSIGNED = {**PRODUCT, "reassign_every": "2", "num_own_tokens": "5"}
CLASSES = {
    "kind": "class_vq",
    "num_codes": "8",
    "num_codebooks": "4",
    "assignment": "random",
    "code_init": "random",
    "num_classes": "30",
    "num_frequent": "9",
}


def config_of(directory: Path, **head: str) -> schema.Config:
    return tiny_config(directory, **{f"model__head__{name}": text for name, text in head.items()})


def save(config: schema.Config, workdir: Path, step: int = 3) -> tuple[Setup, Any]:
    """A checkpoint whose head has learned: scores and codes are not those of its start."""
    directory = workdir / "checkpoints"
    setup = prepare(config, directory, None)
    model = build_model(setup.config, setup.token_map, jax.random.key(0))
    head, rng = model.head, np.random.default_rng(1)
    if hasattr(head, "scores"):
        head.scores[...] = jnp.asarray(rng.standard_normal(head.scores.shape), jnp.float32)
    else:
        head.assignment[...] = jnp.asarray(rng.permutation(head.assignment[...]))
    if isinstance(head, ClassVQHead):
        buffers = head.entries, head.entry_of, head.members, head.rank_of
        tokens = classes.Classes(*(x[...] for x in buffers))
        codes = classes.arrange_codes(head.assignment[...], tokens, head.codebooks.shape[1])
        head.entry_codes[...], head.member_codes[...] = codes.of_entries, codes.of_members
    if hasattr(head, "scale"):
        head.scale[...] = jnp.asarray(rng.random(head.scale.shape), jnp.float32)
    _, params, buffers = functional.split(model)
    opt_state = tiny_optimizer(setup.config).init(params)
    state = TrainState(jnp.asarray(step, jnp.int32), params, buffers, opt_state)
    with Checkpoints(directory, config.train) as checkpoints:
        data = iter(MapDataset.range(9).to_iter_dataset())
        checkpoints.save(step, state, data, setup.to_json())
    return setup, head


@pytest.mark.parametrize(
    "head",
    [
        pytest.param({"num_codes": "32"}, id="one"),
        pytest.param(PRODUCT, id="product"),
        pytest.param(LEARNED, id="learned"),
        pytest.param({**LEARNED, "form": "additive", "num_own_tokens": "5"}, id="additive"),
        pytest.param(REASSIGNED, id="reassigned"),
        pytest.param(CLASSES, id="classes"),
        pytest.param({**CLASSES, "token_scale": "false"}, id="unscaled_classes"),
    ],
)
def test_a_new_run_has_the_logits_of_the_old_one(tmp_path: Path, head: dict[str, str]) -> None:
    """Codes, vectors, scales, own vectors and classes: a head made of the map is the run's head."""
    config = config_of(tmp_path, **head)
    setup, trained = save(config, tmp_path / "run")
    token_map, of_run = run_map(tmp_path / "run")
    assert of_run == setup.config.model.head
    token_map.save(tmp_path / "map.npz")
    plain = {"learned_candidates": None, "reassign_every": None} if "kind" not in head else {}
    of_file: dict[str, Any] = {
        "assignment": "file",
        "token_map": str(tmp_path / "map.npz"),
        "code_init": "centroids",
    }
    new_head = dataclasses.replace(config.model.head, **plain, **of_file)
    new = dataclasses.replace(config, model=dataclasses.replace(config.model, head=new_head))
    new_setup = prepare(new, tmp_path / "new", None)
    model = build_model(new_setup.config, new_setup.token_map, jax.random.key(1))
    h_BxTxD = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 16)), jnp.float32)
    logits = nnx.merge(*nnx.split(model.head)).logits(h_BxTxD)
    np.testing.assert_allclose(logits, trained.logits(h_BxTxD), atol=1e-5)


def test_learned_codes_are_those_that_won(tmp_path: Path) -> None:
    setup, head = save(config_of(tmp_path, **LEARNED), tmp_path / "run")
    token_map, _ = run_map(tmp_path / "run")
    np.testing.assert_array_equal(token_map.codes, head.token_map())
    assert setup.token_map is not None
    assert np.any(token_map.codes != setup.token_map.codes)  # Something has been learned.


def test_provenance_names_the_run(tmp_path: Path) -> None:
    setup, _ = save(config_of(tmp_path, **REASSIGNED), tmp_path / "run", step=7)
    token_map, _ = run_map(tmp_path / "run")
    provenance = token_map.provenance
    assert provenance["run"] == {"source": str(tmp_path / "run"), "step": 7}
    assert provenance["head"]["reassign_every"] == 2
    assert provenance["corpus"]["fingerprint"] == setup.corpus.fingerprint
    assert provenance["tokenizer"] == tokenizer_fingerprint(setup.tokenizer)


@pytest.mark.parametrize("kind", ["full", "low_rank", "hierarchical"])
def test_run_without_codes(tmp_path: Path, kind: str) -> None:
    rank = {"rank": "4"} if kind == "low_rank" else {}
    config = config_of(tmp_path, kind=kind, **rank)
    setup = prepare(config, tmp_path / "run/checkpoints", None)
    model = build_model(setup.config, setup.token_map, jax.random.key(0))
    _, params, buffers = functional.split(model)
    state = TrainState(
        jnp.asarray(1, jnp.int32), params, buffers, tiny_optimizer(setup.config).init(params)
    )
    with Checkpoints(tmp_path / "run/checkpoints", config.train) as checkpoints:
        data = iter(MapDataset.range(9).to_iter_dataset())
        checkpoints.save(1, state, data, setup.to_json())
    with pytest.raises(DataError, match=f"^from_run='.*run': a run with model.head.kind='{kind}'"):
        run_map(tmp_path / "run")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint found there"):
        run_map(tmp_path)


# ---------------------------------------------------------------- the command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["maps", *arguments])
    __main__.main()


def test_map_of_a_real_run_starts_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps, the second of which changes codes; the printed flags give these to a new run."""
    config = config_of(tmp_path, **{**PRODUCT, "reassign_every": "2"})
    config = apply_overrides(config, [("train.steps", "3"), ("model.num_layers", "1")])
    workdir = tmp_path / "run"
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    setup = prepare(config, workdir / "checkpoints", None)
    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir / "checkpoints", config.train) as checkpoints,
    ):
        loop._Run(setup, mesh, checkpoints).execute(workdir)
    output = tmp_path / "map.npz"
    capsys.readouterr()
    command(monkeypatch, f"--from_run={workdir}", f"--output={output}")
    first, last = capsys.readouterr().out.splitlines()
    assert first == "codes    4 x 8 a token, for 264 tokens, of step 3"
    token_map = TokenMap.load(output)
    assert {"vqcx_jax", "date", "run", "head", "corpus"} <= token_map.provenance.keys()
    assert setup.token_map is not None
    assert np.any(token_map.codes != setup.token_map.codes)

    python, script, of_config, workdir, *flags = shlex.split(last.removeprefix("next: "))
    assert (python, script, of_config) == ("python", "train.py", "--config=CONFIG")
    assert workdir == "--workdir=runs/map"
    changes = [tuple(flag.removeprefix("--config.").split("=", 1)) for flag in flags]
    new = prepare(apply_overrides(tiny_config(tmp_path), changes), tmp_path / "new", None)
    assert new.token_map is not None and token_map.codebooks is not None
    np.testing.assert_array_equal(new.token_map.codes, token_map.codes)
    assert new.token_map.codebooks is not None
    np.testing.assert_array_equal(np.stack(new.token_map.codebooks), np.stack(token_map.codebooks))

    with pytest.raises(UserError, match="^--output='.*map.npz': exists; --overwrite=true replaces"):
        command(monkeypatch, f"--from_run={workdir}", f"--output={output}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=x"], "--config: is missing, must be given without --from_run"),
        (["--from_run=.", "--output=x"], "checkpoint='.*': no checkpoint found there"),
        (["--from_run=."], "--output: is missing"),
        (["--from_run=.", "--output=x", "--config=y"], "--config='y': must not be given with --fr"),
        (["--from_run=.", "--output=x", "--num_codes=8"], "--num_codes=8: must not be given with"),
        (
            ["--from_run=.", "--output=x", "--config.model.embed_dim=8"],
            "--config.model.embed_dim='8': must not be given with --from_run",
        ),
        (["--from_run=.", "--output=."], "--output='.': is a directory"),
    ],
)
def test_mistakes_with_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{message}") as caught:
        command(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)
