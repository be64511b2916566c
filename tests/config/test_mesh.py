"""Mesh shapes: the axes fill the devices exactly, or one line says why not."""

import pytest

from vqcx_jax.config import resolve_mesh_shape
from vqcx_jax.config.schema import Mesh
from vqcx_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("mesh", "device_count", "shape"),
    [
        (Mesh(), 1, (1, 1, 1, 1)),
        (Mesh(), 8, (8, 1, 1, 1)),
        (Mesh(data=1, fsdp=-1), 8, (1, 8, 1, 1)),
        (Mesh(data=-1, fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
        (Mesh(data=2, fsdp=-1, tensor=4), 8, (2, 1, 4, 1)),
        (Mesh(data=-1, sequence=4), 8, (2, 1, 1, 4)),
        (Mesh(data=2, fsdp=2, tensor=2), 8, (2, 2, 2, 1)),
    ],
)
def test_shapes(mesh: Mesh, device_count: int, shape: tuple[int, int, int, int]) -> None:
    resolved = resolve_mesh_shape(mesh, device_count)
    assert resolved == dict(zip(("data", "fsdp", "tensor", "sequence"), shape, strict=True))
    assert list(resolved) == ["data", "fsdp", "tensor", "sequence"]


@pytest.mark.parametrize(
    ("mesh", "device_count", "parts"),
    [
        (
            Mesh(data=2, fsdp=2),
            8,
            ["mesh.data=2 * mesh.fsdp=2 * mesh.tensor=1 * mesh.sequence=1:", "equal", "8"],
        ),
        (Mesh(data=4, fsdp=4), 8, ["mesh.data=4 * mesh.fsdp=4", "must equal", "8"]),
        (Mesh(data=-1, fsdp=3), 8, ["mesh.data=-1 * mesh.fsdp=3", "must divide", "8"]),
        (Mesh(data=-1, fsdp=16), 8, ["mesh.fsdp=16", "must divide", "8"]),
        (Mesh(data=-1, fsdp=-1), 8, ["mesh.fsdp=-1: only one axis may be -1, mesh.data is too"]),
        (Mesh(data=0), 8, ["mesh.data=0: must be at least 1, or -1"]),
        (Mesh(tensor=-2), 8, ["mesh.tensor=-2: must be at least 1, or -1"]),
    ],
)
def test_messages(mesh: Mesh, device_count: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_mesh_shape(mesh, device_count)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
