"""A run with codes in classes: stopped, gone on with, and evaluated from its checkpoint."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import records, tiny_config
from versions import oldest_jax

from vqcx_jax import checkpoint
from vqcx_jax.config import schema
from vqcx_jax.errors import CheckpointError
from vqcx_jax.evaluation import TrainedModel
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training import loop
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.setup import prepare

pytestmark = oldest_jax

HEAD = {
    "kind": "class_vq",
    "num_codes": "8",
    "num_codebooks": "4",
    "num_classes": "30",
    "num_frequent": "9",
    "token_scale": "true",
    "code_init": "centroids",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> schema.Config:
    return tiny_config(
        tmp_path_factory.mktemp("corpus"),
        model__num_layers="1",
        optimizer__schedule="constant",
        train__steps="4",
        train__checkpoint_every="2",
        **{f"model__head__{name}": value for name, value in HEAD.items()},
    )


def execute(config: schema.Config, workdir: Path) -> loop.TrainResult:
    """Trains on one device, or goes on with the newest checkpoint."""
    directory = workdir / "checkpoints"
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    newest = max(checkpoint.steps(directory), default=None)
    with jax.set_mesh(mesh), Checkpoints(directory, config.train) as checkpoints:
        return loop._Run(prepare(config, directory, newest), mesh, checkpoints).execute(workdir)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def whole(config: schema.Config, workdir: Path) -> loop.TrainResult:
    return execute(config, workdir)


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in records(workdir) if "loss" in record]


def test_a_run_goes_on_as_if_it_had_not_stopped(
    config: schema.Config, workdir: Path, whole: loop.TrainResult, tmp_path: Path
) -> None:
    execute(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), tmp_path)
    resumed = execute(config, tmp_path)
    assert len(losses(tmp_path)) == 4
    assert losses(tmp_path) == losses(workdir)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    assert resumed.validation == whole.validation


def test_the_checkpoint_is_enough(
    config: schema.Config, workdir: Path, whole: loop.TrainResult
) -> None:
    setup = prepare(config, workdir / "none", None)
    assert setup.token_map is not None and setup.token_map.classes is not None
    model = TrainedModel.load(workdir)
    codes = np.append(setup.token_map.codes, setup.token_map.classes.codes, axis=0)
    np.testing.assert_array_equal(model.buffers["head"]["assignment"], codes)
    assert whole.validation is not None
    loss = model.perplexity("validation").loss
    assert loss.perplexity == pytest.approx(whole.validation.perplexity, rel=1e-5)
    assert loss.tokens == whole.validation.tokens
    texts = [model.generate("the", max_tokens=9, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_other_classes_are_another_architecture(
    config: schema.Config, workdir: Path, whole: loop.TrainResult
) -> None:
    assert isinstance(config.model.head, schema.ClassVQHead)
    head = dataclasses.replace(config.model.head, num_classes=31)
    model = dataclasses.replace(config.model, head=head)
    with pytest.raises(CheckpointError, match="buffers/head/entries: int32.39,. in the checkpoint"):
        prepare(dataclasses.replace(config, model=model), workdir / "checkpoints", whole.step)
