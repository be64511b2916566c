"""What all Pallas kernels for TPUs need."""

from typing import Any

import jax
from jax.experimental import pallas as pl

LANES = 128
VMEM_LIMIT = 60 * 2**20  # Bytes, of the 64 MiB a core that the smallest supported chips have.


def out_shape(shape: tuple[int, ...], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Of an output that varies over the mesh axes of `shard_map` that `like` varies over."""
    kind = jax.typeof(like).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return pl.cdiv(number, multiple) * multiple


def num_cores(device_kind: str) -> int:
    """Of a chip, which a "parallel" axis of a grid is spread over: chips of one device."""
    return 2 if device_kind in ("TPU v4", "TPU v5", "TPU v5p") else 1


def vmem_limit(device_kind: str) -> int:
    """Bytes of vector memory that a kernel may ask for on chips of one kind."""
    has_more = device_kind in ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
    return 2 * VMEM_LIMIT if has_more else VMEM_LIMIT
