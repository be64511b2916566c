"""Which implementation of an operation runs: the one that is named, or the kernel where it can.

An operation has a plain JAX implementation, "xla", that runs everywhere, and may have kernels: for
TPUs ("pallas_tpu"), for Hopper GPUs ("mosaic_gpu"), or the GPU maker's own ("cudnn"). A kernel that
cannot do what is asked raises `NotSupported` while it is traced. For an implementation that the
caller named, that is an error; without a name, the next one runs, and a warning says so once.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device

XLA, PALLAS_TPU, MOSAIC_GPU, CUDNN = "xla", "pallas_tpu", "mosaic_gpu", "cudnn"
# What a kernel runs on. Where an operation has several for a platform, they are tried in order.
_PLATFORMS = {PALLAS_TPU: "tpu", CUDNN: "gpu", MOSAIC_GPU: "gpu"}

_Result = TypeVar("_Result")
_recorders: list[list[tuple[str, str]]] = []
_warned: set[tuple[str, str]] = set()


class NotSupported(Exception):
    """A kernel cannot do this; the message says what, and what it can."""


def run(
    operation: str, implementations: Mapping[str, Callable[[], _Result]], name: str | None
) -> _Result:
    """Calls the implementation `name`; without one, a kernel for the device, else plain JAX.

    Args:
        operation: for messages.
        implementations: by name, "xla" among them.
        name: None: choose.

    Raises:
        UserError: there is no implementation `name`, or it cannot run here or with these arguments.
    """
    platform = device.current().platform
    if name is not None:
        if name not in implementations:
            accepted = ", ".join(sorted(implementations))
            raise UserError(f"implementation={name!r}: {operation} has {accepted}")
        needed = _PLATFORMS.get(name, platform)
        if platform != needed:
            raise UserError(f"implementation={name!r}: needs a {needed}, and this is a {platform}")
        try:
            return _recorded(operation, name, implementations[name])
        except NotSupported as error:
            raise UserError(f"implementation={name!r}: {error}") from error
    for kernel, needed in _PLATFORMS.items():
        if kernel in implementations and needed == platform:
            try:
                return _recorded(operation, kernel, implementations[kernel])
            except NotSupported as error:
                _warn_once(operation, kernel, str(error))
    return _recorded(operation, XLA, implementations[XLA])


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """A list of the (operation, implementation) that were traced within the block."""
    traced: list[tuple[str, str]] = []
    _recorders.append(traced)
    try:
        yield traced
    finally:
        _recorders.remove(traced)


def _recorded(operation: str, name: str, implementation: Callable[[], _Result]) -> _Result:
    result = implementation()
    for traced in _recorders:
        traced.append((operation, name))
    return result


def _warn_once(operation: str, kernel: str, reason: str) -> None:
    if (operation, reason) not in _warned:
        _warned.add((operation, reason))
        warnings.warn(f"{operation}: not by {kernel}: {reason}", stacklevel=4)
