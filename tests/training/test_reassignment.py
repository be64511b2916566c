"""A run whose token map changes: on any mesh, in any number of microbatches, and after a stop."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import records, tiny_config
from versions import oldest_jax

from vqcx_jax import checkpoint
from vqcx_jax.config import schema
from vqcx_jax.nn import functional
from vqcx_jax.nn.build import abstract_model
from vqcx_jax.nn.loss import observed_nll
from vqcx_jax.sharding import make_mesh
from vqcx_jax.training import loop
from vqcx_jax.training.batches import to_microbatches
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.setup import prepare

pytestmark = oldest_jax

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
EIGHT = {"data": 2, "fsdp": 2, "tensor": 2}
ADDITIVE = {"model__head__num_codebooks": "2", "model__head__assignment": "random"}
PRODUCT = ADDITIVE | {"model__head__form": "product", "model__head__token_scale": "true"}


def make_config(directory: Path, **overrides: str) -> schema.Config:
    options = {
        "model__num_layers": "1",
        "model__head__num_codes": "8",
        "model__head__reassign_every": "2",
        "model__head__reassign_decay": "0.5",
        "train__checkpoint_every": "1",
        "train__keep_checkpoints": "9",
    }
    return tiny_config(directory, **(options | overrides))


def start(config: schema.Config, workdir: Path, shape: Any = ONE, kind: str = "explicit") -> Any:
    """A mesh and a run on it that has not begun (or goes on with its newest checkpoint)."""
    directory = workdir / "checkpoints"
    mesh = make_mesh(shape, kind, jax.devices()[: int(np.prod(list(shape.values())))])
    newest = max(checkpoint.steps(directory), default=None)
    with jax.set_mesh(mesh), Checkpoints(directory, config.train) as checkpoints:
        return mesh, loop._Run(prepare(config, directory, newest), mesh, checkpoints)


def execute(config: schema.Config, workdir: Path, like: loop._Run | None = None) -> loop._Run:
    """A run after its last step; with what `like` has compiled, if given."""
    directory = workdir / "checkpoints"
    mesh = make_mesh(ONE, devices=jax.devices()[:1])
    newest = max(checkpoint.steps(directory), default=None)
    with jax.set_mesh(mesh), Checkpoints(directory, config.train) as checkpoints:
        run = loop._Run(prepare(config, directory, newest), mesh, checkpoints)
        if like is not None:
            run.train_step, run.eval_step = like.train_step, like.eval_step
        run.execute(workdir)
    return run


def head_after(run: Any, mesh: Any, steps: int, microbatches: int = 1) -> list[dict[str, Any]]:
    """The head's buffers after every step."""
    found = []
    with jax.set_mesh(mesh):
        for _ in range(steps):
            rows = next(run.batches)
            batch = to_microbatches(rows, microbatches, mesh, run.config.sharding)
            run.state, _ = run.train_step(run.state, batch)
            found.append(jax.device_get(run.state.buffers["head"]))
    return found


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = make_config(tmp_path, train__steps="5")
    run = execute(config, tmp_path / "whole")
    whole = jax.device_get(run.state)
    setup = prepare(config, tmp_path / "none", None)
    assert setup.token_map is not None

    def codes_at(step: int) -> Any:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        _, params, buffers = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
            functional.split(abstract_model(setup.config)),
        )
        directory = tmp_path / "whole" / "checkpoints"
        tree = checkpoint.load_model(directory, step, {"params": params, "buffers": buffers})
        return np.asarray(tree["buffers"]["head"]["assignment"])

    np.testing.assert_array_equal(codes_at(1), setup.token_map.codes)
    assert np.any(codes_at(2) != codes_at(1))
    np.testing.assert_array_equal(codes_at(3), codes_at(2))
    np.testing.assert_array_equal(codes_at(5), whole.buffers["head"]["assignment"])
    # Between two reassignments: the next one is made of statistics from before the stop.
    stopped = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    execute(stopped, tmp_path / "stopped", run)
    resumed = jax.device_get(execute(config, tmp_path / "stopped", run).state)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    losses = [
        [r["loss"] for r in records(tmp_path / name) if "loss" in r][-2:]
        for name in ("whole", "stopped")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("kind", "options"), [("explicit", PRODUCT), ("auto", ADDITIVE)], ids=["explicit", "auto"]
)
def test_statistics_do_not_depend_on_the_mesh(
    tmp_path: Path, kind: str, options: dict[str, str]
) -> None:
    config = make_config(tmp_path, **options)
    mesh, run = start(config, tmp_path / "one")
    expected = head_after(run, mesh, 2, microbatches=2)
    mesh, run = start(config, tmp_path / "eight", EIGHT, kind)
    actual = head_after(run, mesh, 2, microbatches=2)
    assert run.state.buffers["head"]["sums"].sharding.shard_shape((264, 16)) == (264, 8)
    assert run.state.buffers["head"]["assignment"].sharding.is_fully_replicated
    for one, eight in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(eight["counts"], one["counts"])
        np.testing.assert_allclose(eight["sums"], one["sums"], rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(eight["assignment"], one["assignment"])
    assert np.any(expected[1]["assignment"] != expected[0]["assignment"])


def test_all_steps_and_microbatches_count(tmp_path: Path) -> None:
    config = make_config(tmp_path, model__head__num_own_tokens="5")
    batches = iter(loop._training_batches(prepare(config, tmp_path / "rows", None)))
    targets = [next(batches) for _ in range(2)]
    counts = [
        np.bincount(rows["targets"][rows["segment_ids"] != 0], minlength=264) for rows in targets
    ]
    mesh, run = start(config, tmp_path / "whole")
    whole = head_after(run, mesh, 2)
    mesh, run = start(config, tmp_path / "parts")
    parts = head_after(run, mesh, 2, microbatches=4)
    np.testing.assert_array_equal(whole[0]["counts"], counts[0])
    np.testing.assert_array_equal(whole[1]["counts"], 0.5 * counts[0] + counts[1])
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a["counts"], b["counts"])
        np.testing.assert_allclose(a["sums"], b["sums"], rtol=1e-3, atol=1e-4)
    changed = np.any(whole[1]["assignment"] != whole[0]["assignment"], axis=1)
    assert np.any(changed)
    assert np.all(whole[1]["counts"][changed] >= 8)
    # Own tokens are the frequent ones, and keep their codes all the same.
    own = whole[1]["own_tokens"]
    assert np.all(whole[1]["counts"][own] >= 8)
    assert not np.any(changed[own])


def test_other_heads_observe_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, model__num_layers="1")
    setup = prepare(config, tmp_path / "none", None)
    graphdef, params, buffers = functional.split(abstract_model(setup.config))
    shape = jax.ShapeDtypeStruct((8, 32), np.int32)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), shape)
    aux = jax.eval_shape(partial(observed_nll, graphdef), params, buffers, batch)[1]
    assert aux[2] is None
