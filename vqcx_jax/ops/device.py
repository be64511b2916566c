"""Which accelerator a traced program is for."""

from typing import NamedTuple

import jax

# Names that tables of block sizes use, by the beginning of JAX's device kind, the longest first.
_CHIPS = (
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6", "v6e"),
    ("TPU7x", "tpu7x"),
    ("TPU v7", "tpu7x"),
    ("NVIDIA H100", "h100"),
    ("NVIDIA H200", "h200"),
)


class Device(NamedTuple):
    """Attributes: platform "cpu", "gpu" or "tpu"; chip, a short name such as "v5p", or None."""

    platform: str
    chip: str | None


def current() -> Device:
    """The devices of the current mesh, which may be described and not there; else the default."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is None:
        default = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
        if isinstance(default, str):
            default = jax.devices(default)[0]
        platform, kind = default.platform, default.device_kind
    else:
        platform, kind = described.platform, described.device_kind
    chips = (chip for beginning, chip in _CHIPS if kind.startswith(beginning))
    return Device("gpu" if platform in ("cuda", "rocm") else platform, next(chips, None))
