"""Writing the checkpoints of a run, and going on from one. See `vqcx_jax.checkpoint`."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grain
from orbax.checkpoint import v1 as ocp

from vqcx_jax.checkpoint import orbax_context
from vqcx_jax.config import schema
from vqcx_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, in `directory`; saving is asynchronous."""

    def __init__(self, directory: Path, config: schema.Training):
        decide = ocp.training.save_decision_policies
        preserve = ocp.training.preservation_policies
        kept = [preserve.LatestN(config.keep_checkpoints)]
        if config.keep_every is not None:
            kept.append(preserve.EveryNSteps(config.keep_every))
        self.directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory,
            context=orbax_context(),
            save_decision_policy=decide.FixedIntervalPolicy(config.checkpoint_every),
            preservation_policy=preserve.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._checkpointer.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def is_due(self, step: int) -> bool:
        """Whether the save interval ends at `step`."""
        return self._checkpointer.should_save(step)

    def save(
        self, step: int, state: TrainState, data: grain.DatasetIterator, run: dict[str, Any]
    ) -> None:
        """Starts writing; returns once the arrays are copied and may be overwritten."""
        if step == self.latest_step:
            return
        self._checkpointer.save_checkpointables_async(
            step,
            {
                "model": {"params": state.params, "buffers": state.buffers},
                "optimizer": {"opt_state": state.opt_state, "step": state.step},
                "data": data,
                "run": run,
            },
            force=True,
        )

    def restore(self, step: int, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The state saved at `step`, laid out as the abstract `state`; moves `data` there."""
        self._checkpointer.wait()  # A save that is under way has no checkpoint to read yet.
        loaded = self._checkpointer.load_checkpointables(
            step,
            {
                "model": {"params": state.params, "buffers": state.buffers},
                "optimizer": {"opt_state": state.opt_state, "step": state.step},
                "data": data,
            },
        )
        return TrainState(
            loaded["optimizer"]["step"],
            loaded["model"]["params"],
            loaded["model"]["buffers"],
            loaded["optimizer"]["opt_state"],
        )
