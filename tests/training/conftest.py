"""The same run on three meshes, executed once for all tests of the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import Event, FinishedRun, tiny_config
from versions import oldest_jax

from vqcx_jax.config import schema
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training import loop
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.reporting import Reporter
from vqcx_jax.training.setup import prepare

_ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}
_EIGHT_DEVICES = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="package")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> schema.Config:
    return tiny_config(
        tmp_path_factory.mktemp("corpus"),
        train__steps="13",
        train__eval_every="5",
        train__checkpoint_every="4",
        train__peak_flops="1e12",
        train__sample_tokens="5",
    )


@pytest.fixture(scope="package")
def one_device(run_config: schema.Config, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    mesh = make_mesh(_ONE_DEVICE, devices=jax.devices()[:1])
    return _execute(run_config, mesh, tmp_path_factory.mktemp("one_device"))


@pytest.fixture(scope="package", params=["explicit", pytest.param("auto", marks=oldest_jax)])
def eight_devices(
    run_config: schema.Config,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> FinishedRun:
    mesh = make_mesh(_EIGHT_DEVICES, request.param)
    return _execute(run_config, mesh, tmp_path_factory.mktemp(request.param))


def _execute(config: schema.Config, mesh: jax.sharding.Mesh, workdir: Path) -> FinishedRun:
    directory = workdir / "checkpoints"
    setup = prepare(config, directory, None)
    events: list[Event] = []
    with (
        jax.set_mesh(mesh),
        Checkpoints(directory, config.train) as checkpoints,
        pytest.MonkeyPatch.context() as patch,
    ):
        run = loop._Run(setup, mesh, checkpoints)
        initial = jax.tree.map(np.asarray, run.state.params)
        patch.setattr(run, "train_step", _recorded(run.train_step, events))
        patch.setattr(loop, "Reporter", _recording_reporter(events))
        result = run.execute(workdir)
    return FinishedRun(setup.config, workdir, run, initial, events, result)


def _recorded(train_step: Callable[..., Any], events: list[Event]) -> Callable[..., Any]:
    def recorded(state: Any, batch: Any) -> Any:
        step = sum(name == "dispatch" for name, _ in events) + 1
        events.append(("dispatch", step))
        return train_step(state, batch)

    return recorded


def _recording_reporter(events: list[Event]) -> type[Reporter]:
    class RecordingReporter(Reporter):
        def step(self, step: int, metrics: dict[str, float]) -> None:
            events.append(("report", step))
            super().step(step, metrics)

    return RecordingReporter
