"""Finding and reading checkpoints."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import save_checkpoint, tiny_config

from vqcx_jax import checkpoint
from vqcx_jax.config import from_json
from vqcx_jax.errors import CheckpointError
from vqcx_jax.training.state import TrainState


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module", autouse=True)
def saved(workdir: Path) -> dict[int, TrainState]:
    config = tiny_config(workdir)
    return {step: save_checkpoint(config, workdir, step) for step in (3, 20)}


def test_what_a_user_may_name(workdir: Path) -> None:
    directory = workdir / "checkpoints"
    for path in (workdir, directory):
        assert checkpoint.locate(path) == (directory, 20)
        assert checkpoint.locate(path, 3) == (directory, 3)
    assert checkpoint.locate(directory / "3") == (directory, 3)


def test_relative_path(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir.parent)
    assert checkpoint.locate(Path(workdir.name)) == (workdir / "checkpoints", 20)


@pytest.mark.parametrize("path", ["nowhere", "empty", "run_without", "checkpoints/7"])
def test_no_checkpoint(workdir: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run_without/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.locate(tmp_path / path)
    assert str(caught.value) == f"checkpoint={str(tmp_path / path)!r}: no checkpoint found there"


def test_missing_step(workdir: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.locate(workdir, 4)
    directory = str(workdir / "checkpoints")
    assert str(caught.value) == f"step=4: {directory!r} has the steps [3, 20]"


def test_steps(workdir: Path) -> None:
    assert checkpoint.steps(workdir / "checkpoints") == [3, 20]
    assert checkpoint.steps(workdir / "nowhere") == []


def test_run_is_all_that_is_needed_besides_the_arrays(workdir: Path) -> None:
    run = checkpoint.load_run(workdir / "checkpoints", 20)
    assert from_json(run["config"]) == tiny_config(workdir)
    assert run["tokenizer"] == {"kind": "bytes"}
    assert run["corpus"]["name"] == "text_files" and len(run["corpus"]["fingerprint"]) == 16


def test_model_alone(workdir: Path, saved: dict[int, TrainState]) -> None:
    model = {"params": saved[3].params, "buffers": saved[3].buffers}
    loaded = checkpoint.load_model(workdir / "checkpoints", 3, model)
    jax.tree.map(np.testing.assert_array_equal, loaded, model)


def test_model_of_another_architecture(workdir: Path, saved: dict[int, TrainState]) -> None:
    table = jax.ShapeDtypeStruct((264, 17), np.float16)
    params = {**saved[3].params, "embedding": {"table": table}}
    with pytest.raises(CheckpointError) as caught:
        model = {"params": params, "buffers": saved[3].buffers}
        checkpoint.load_model(workdir / "checkpoints", 3, model)
    assert str(caught.value) == (
        f"checkpoint {str(workdir / 'checkpoints/3')!r} is of another architecture: "
        "params/embedding/table: float32(264, 16) in the checkpoint, float16(264, 17) in the model"
    )


@pytest.mark.parametrize("part", ["run", "model"])
def test_damaged_checkpoint(
    workdir: Path, saved: dict[int, TrainState], tmp_path: Path, part: str
) -> None:
    """As a copy that was cut short: one line, not a traceback of Orbax."""
    shutil.copytree(workdir / "checkpoints/3", tmp_path / "3")
    shutil.rmtree(tmp_path / "3" / part)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_run(tmp_path, 3)
        checkpoint.load_model(tmp_path, 3, {"params": saved[3].params, "buffers": {}})
    message = str(caught.value)
    assert message.startswith(f"checkpoint {str(tmp_path / '3')!r} cannot be read: ")
    assert "\n" not in message
