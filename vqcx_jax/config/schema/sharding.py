"""Devices, and what is sharded over them."""

from typing import Literal

from pydantic.dataclasses import dataclass

from vqcx_jax.config.schema.types import STRICT, MeshAxes


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Mesh:
    """Devices along each mesh axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    axis_type: Literal["explicit", "auto"] = "explicit"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShardingRules:
    """Logical axis -> mesh axes. The one place that says what is sharded over what."""

    batch: MeshAxes = ("data", "fsdp")
    # Positions of a row, for long ones. Attention gathers keys and values of whole rows.
    sequence: MeshAxes = ()
    embed: MeshAxes = ("fsdp",)
    vocab: MeshAxes = ("tensor",)
    # Query and key heads alike: a query head and its key head are on one device.
    heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    codes: MeshAxes = ()
