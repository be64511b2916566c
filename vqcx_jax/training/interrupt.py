"""SIGTERM and SIGINT as a request to stop after the current step, with a checkpoint."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """A context in which the first SIGTERM or SIGINT sets a flag; a second one acts as usual.

    In a multi-host run JAX itself catches SIGTERM, to agree with the other processes on a step;
    SIGINT acts as usual. So do both outside the main thread (in notebooks, say), where Python
    lets nobody catch signals.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        main_thread = threading.current_thread() is threading.main_thread()
        if jax.process_count() > 1 or not main_thread:
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def received(self, step: int) -> int | None:
        """The signal that asks to stop after `step`; all processes of a run answer alike."""
        if jax.process_count() > 1:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._received

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
