"""One place that turns logical axes ("batch", "embed", "heads"...) into shardings.

`ShardingRules` (in the config) says which mesh axes each logical axis is sharded over. Weights
carry the names of their logical axes; activations are named where they are made. The same code
runs without a mesh, on a mesh with Auto axes and on one with Explicit axes: the helpers here
are the only functions that know the difference.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.errors import UserError

LogicalAxes = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(
    shape: Mapping[Any, int],
    axis_type: str = "explicit",
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with axes data, fsdp, tensor and sequence.

    Args:
        shape: devices along each axis, 1 for those not named; the product is their number.
        axis_type: "explicit" or "auto".
        devices: default all of them.
    """
    kind = AxisType.Explicit if axis_type == "explicit" else AxisType.Auto
    sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(kind,) * len(sizes), devices=devices)


def partition_spec(
    axes: LogicalAxes, rules: ShardingRules, mesh: Mesh | AbstractMesh | None = None
) -> PartitionSpec:
    """The mesh axes of each array dimension; None (or no rule) leaves a dimension whole.

    Args:
        mesh: None: the current one. Axes that it has not are as axes of one device, so that heads
            and layers work within the mesh of another program.
    """
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        names = () if axis is None else _of_mesh(getattr(rules, axis), mesh)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def _of_mesh(names: tuple[str, ...], mesh: Mesh | AbstractMesh | None) -> tuple[str, ...]:
    """Those of the axes that a mesh has; all of them without a mesh."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return names if mesh.empty else tuple(name for name in names if name in mesh.axis_names)


def mesh_axes(axis: str, rules: ShardingRules) -> tuple[str, ...]:
    """The axes of the current mesh that `per_device` cuts a logical axis over; none without one."""
    return () if _current_axis_type() is None else _of_mesh(getattr(rules, axis), None)


def token_mesh_axes(rules: ShardingRules) -> tuple[str, ...]:
    """The axes of the current mesh that `per_device` cuts rows and positions over."""
    return mesh_axes("batch", rules) + mesh_axes("sequence", rules)


def block_index(axis: str, rules: ShardingRules) -> jax.Array | int:
    """Inside `per_device`: which block of a logical axis this device has."""
    axes = mesh_axes(axis, rules)
    return jax.lax.axis_index(axes) if axes else 0


def named_sharding(mesh: Mesh, axes: LogicalAxes, rules: ShardingRules) -> NamedSharding:
    """The sharding of an array whose dimensions are `axes`."""
    return NamedSharding(mesh, partition_spec(axes, rules, mesh))


def _current_axis_type() -> AxisType | None:
    """Explicit or Auto, as the current mesh has it; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    return AxisType.Explicit if AxisType.Explicit in mesh.axis_types else AxisType.Auto


def constrain(x: jax.Array, axes: LogicalAxes, rules: ShardingRules) -> jax.Array:
    """Lays x out along `axes`. On a weight this is the all-gather of FSDP, and its transpose.

    Raises:
        UserError: a dimension that is no multiple of the devices it is cut over.
    """
    axis_type = _current_axis_type()
    if axis_type is None:
        return x
    spec = partition_spec(axes, rules)
    _check_divisible(x, axes, spec)
    if axis_type is AxisType.Explicit:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def _check_divisible(x: jax.Array, axes: LogicalAxes, spec: PartitionSpec) -> None:
    sizes = jax.sharding.get_abstract_mesh().shape
    for axis, entry, size in zip(axes, spec, x.shape, strict=False):
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        devices = math.prod(sizes[name] for name in names)
        if size % devices:
            raise UserError(
                f"shape {x.shape}: {axis} of {size} must be a multiple of {devices}, the devices "
                f"of the mesh axes {', '.join(names)}"
            )


def einsum(
    subscripts: str, x: jax.Array, w: jax.Array, out_axes: LogicalAxes, rules: ShardingRules
) -> jax.Array:
    """jnp.einsum whose result is laid out along `out_axes`, though a contracted axis is sharded."""
    if _current_axis_type() is AxisType.Explicit:
        spec = partition_spec(out_axes, rules)
        return jnp.einsum(subscripts, x, w, out_sharding=spec)
    return constrain(jnp.einsum(subscripts, x, w), out_axes, rules)


def take_rows(
    table: jax.Array, index: jax.Array, out_axes: LogicalAxes, rules: ShardingRules
) -> jax.Array:
    """table[index] whose result is laid out along `out_axes`, though rows are sharded."""
    if _current_axis_type() is AxisType.Explicit:
        return table.at[index].get(out_sharding=partition_spec(out_axes, rules))
    return constrain(table[index], out_axes, rules)


def cuts_tokens_explicitly(rules: ShardingRules) -> bool:
    """Whether the current mesh has Explicit axes, and the rules cut rows or positions over them."""
    return _current_axis_type() is AxisType.Explicit and bool(token_mesh_axes(rules))


def by_compiler(
    function: Callable[..., Any], out_axes: LogicalAxes, rules: ShardingRules
) -> Callable[..., Any]:
    """Runs `function` with Auto axes, on a mesh whose axes are Explicit.

    For functions of many gathers, whose shardings need not be spelled out. What they use of arrays
    they must take as arguments, and what they return is laid out along `out_axes`.
    """
    return jax.sharding.auto_axes(function, out_sharding=partition_spec(out_axes, rules))


def per_device(
    function: Callable[..., Any],
    in_axes: Sequence[LogicalAxes],
    out_axes: Sequence[LogicalAxes],
    rules: ShardingRules,
) -> Callable[..., Any]:
    """Runs `function` on each device's own block of its arguments (plainly, without a mesh).

    For functions that are independent along every sharded axis, such as attention over batch and
    heads. This is also the form in which hand-written kernels must be called.

    Args:
        function: takes one array, or a tree of them, for each of `in_axes`, and returns a tuple of
            as many as `out_axes`. Arrays may lie on the mesh in another way than they are cut.

    Raises:
        UserError: a dimension of an argument that is no multiple of the devices it is cut over.
    """
    axis_type = _current_axis_type()
    if axis_type is None:
        return function
    mapped = jax.shard_map(
        function,
        in_specs=tuple(partition_spec(axes, rules) for axes in in_axes),
        out_specs=tuple(partition_spec(axes, rules) for axes in out_axes),
    )

    def lay_out(tree: Any, axes: LogicalAxes) -> Any:
        return jax.tree.map(lambda x: constrain(x, axes, rules), tree)

    def check(tree: Any, axes: LogicalAxes) -> Any:
        spec = partition_spec(axes, rules)
        jax.tree.map(lambda x: _check_divisible(x, axes, spec), tree)
        return tree

    # With Explicit axes shard_map asks for arguments that lie as they are cut.
    prepare = lay_out if axis_type is AxisType.Explicit else check
    return lambda *args: mapped(*map(prepare, args, in_axes))
