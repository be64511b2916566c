"""From the mesh section to the size of every mesh axis."""

import math
from typing import get_args

from vqcx_jax.config.schema import Mesh, MeshAxis
from vqcx_jax.errors import ConfigError

MESH_AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)


def minimum_mesh_shape(mesh: Mesh) -> dict[MeshAxis, int]:
    """Returns the size of every mesh axis; -1 counts as 1, which divides whatever it becomes.

    Raises:
      ConfigError: a size below 1 that is not -1, or a second -1.
    """
    shape: dict[MeshAxis, int] = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    for axis, size in shape.items():
        if size < 1 and size != -1:
            raise ConfigError(
                f"mesh.{axis}={size}: must be at least 1, or -1 for all devices that remain"
            )
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}=-1: only one axis may be -1, mesh.{free[0]} is too")
    return {axis: max(size, 1) for axis, size in shape.items()}


def resolve_mesh_shape(mesh: Mesh, device_count: int) -> dict[MeshAxis, int]:
    """Returns the size of every mesh axis, with -1 replaced by what remains of the devices.

    Raises:
      ConfigError: the axes do not fill `device_count` devices exactly.

    Example:
      resolve_mesh_shape(Mesh(data=-1, fsdp=4), 8)  # {"data": 2, "fsdp": 4, "tensor": 1}
    """
    shape = minimum_mesh_shape(mesh)
    remaining, excess = divmod(device_count, math.prod(shape.values()))
    free = [axis for axis in MESH_AXES if getattr(mesh, axis) == -1]
    if excess or (remaining > 1 and not free):
        product = " * ".join(f"mesh.{axis}={getattr(mesh, axis)}" for axis in MESH_AXES)
        rule = "sizes must divide" if free else "without a -1 the product must equal"
        raise ConfigError(f"{product}: {rule} the device count, {device_count}")
    return shape | {axis: remaining for axis in free}
