"""Devices that are not there."""

import importlib
from collections.abc import Iterator

import pytest

from vqcx_jax.ops import device


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that says it is an H100, and kernels that are interpreted, looking for races."""
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    monkeypatch.setattr(device, "current", lambda: device.Device("gpu", "NVIDIA H100 80GB HBM3"))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
