"""Saving: which checkpoints are kept, what a kill leaves behind, and what a save captures."""

import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqcx_jax import checkpoint
from vqcx_jax.config import schema
from vqcx_jax.training.checkpointing import Checkpoints
from vqcx_jax.training.state import TrainState


def make_state(value: float, size: int = 3) -> TrainState:
    fill = jnp.full((size,), value, jnp.float32)
    step = jnp.asarray(value, jnp.int32)
    return TrainState(step, {"w": fill}, {"b": fill - 0.5}, ({"m": fill + 0.5},))


def batches() -> grain.DatasetIterator:
    return iter(grain.MapDataset.range(1000).to_iter_dataset())


def save_steps(directory: Path, config: schema.Training, last: int) -> None:
    data = batches()
    with Checkpoints(directory, config) as checkpoints:
        for step in range(1, last + 1):
            next(data)
            if checkpoints.is_due(step):
                checkpoints.save(step, make_state(step), data, {"step": step})


def restore(directory: Path, step: int) -> tuple[TrainState, int]:
    """The state, and the next element of the data."""
    data = batches()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(0)
    )
    with Checkpoints(directory, schema.Training()) as checkpoints:
        return checkpoints.restore(step, abstract, data), next(data)


def test_round_trip(tmp_path: Path) -> None:
    save_steps(tmp_path, schema.Training(checkpoint_every=5), 10)
    state, following = restore(tmp_path, 5)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(5))
    assert following == 5
    assert checkpoint.load_run(tmp_path, 10) == {"step": 10}


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (schema.Training(checkpoint_every=2, keep_checkpoints=1), [12]),
        (schema.Training(checkpoint_every=2, keep_checkpoints=3), [8, 10, 12]),
        (schema.Training(checkpoint_every=2, keep_checkpoints=2, keep_every=4), [4, 8, 10, 12]),
        (schema.Training(checkpoint_every=5, keep_checkpoints=9), [5, 10]),
    ],
)
def test_retention(tmp_path: Path, config: schema.Training, kept: list[int]) -> None:
    save_steps(tmp_path, config, 12)
    assert checkpoint.steps(tmp_path) == kept
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == kept


def test_saving_a_step_again_keeps_the_first(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, schema.Training()) as checkpoints:
        checkpoints.save(7, make_state(7), batches(), {})
        checkpoints.save(7, make_state(8), batches(), {})
        assert checkpoints.latest_step == 7
    assert restore(tmp_path, 7)[0].step == 7


def test_half_written_checkpoints_are_ignored_and_removed(tmp_path: Path) -> None:
    save_steps(tmp_path, schema.Training(checkpoint_every=5), 5)
    half = tmp_path / "10.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", half)
    shutil.rmtree(half / "model")
    assert checkpoint.steps(tmp_path) == [5]
    assert checkpoint.locate(tmp_path) == (tmp_path, 5)
    with Checkpoints(tmp_path, schema.Training()) as checkpoints:
        assert checkpoints.latest_step == 5
        checkpoints.save(10, make_state(10), batches(), {})
    assert not half.exists()
    assert restore(tmp_path, 10)[0].step == 10


def test_a_save_captures_the_state_though_its_memory_is_reused(tmp_path: Path) -> None:
    """The next step runs while the arrays are written, in the buffers of this one."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state, data = make_state(1, size=3_000_000), batches()
    expected = np.asarray(state.params["w"]).copy()
    with Checkpoints(tmp_path, schema.Training()) as checkpoints:
        next(data)
        checkpoints.save(1, state, data, {})
        for _ in range(20):
            state = step(state)
            next(data)
        jax.block_until_ready(state)
        loaded = checkpoints.restore(1, state, data)
    np.testing.assert_array_equal(loaded.params["w"], expected)
    assert loaded.step == 1
    assert next(data) == 1
