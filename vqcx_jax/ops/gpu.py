"""What kernels for Hopper GPUs share. They are written for Pallas's Mosaic GPU backend."""

import importlib
from typing import Any

import jax

from vqcx_jax.ops import device, dispatch

_HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")


def require_hopper() -> None:
    """Raises `NotSupported` where kernels for Hopper cannot run."""
    kind = device.current().kind
    if not kind.startswith(_HOPPER):
        raise dispatch.NotSupported(f"device {kind!r}: kernels are for Hopper GPUs")
    if jax.__version_info__ < (0, 11):
        raise dispatch.NotSupported(f"jax {jax.__version__}: kernels for GPUs need 0.11")


def pallas() -> Any:
    """The module `jax.experimental.pallas.mosaic_gpu`, which nobody else needs to import."""
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")
