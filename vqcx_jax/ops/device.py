"""Which accelerator a traced program is for."""

from typing import NamedTuple

import jax


class Device(NamedTuple):
    """Attributes: platform, "cpu", "tpu"...; kind, JAX's name of the model, such as "TPU v5"."""

    platform: str
    kind: str


def current() -> Device:
    """The devices of the current mesh, which may be described and not there; else the default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Device(described.platform, described.device_kind)
    default = jax.devices()[0]
    return Device(default.platform, default.device_kind)
