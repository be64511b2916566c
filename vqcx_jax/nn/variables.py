"""The two kinds of array a module holds, and what the trainer must know about each."""

import jax
from flax import nnx

from vqcx_jax.sharding import LogicalAxes


class Buffer(nnx.Variable[jax.Array]):
    """An array that belongs to the model and is saved with it, but is never trained."""


class Param(nnx.Param[jax.Array]):
    """A trained array, with the logical axes it is sharded along and whether it is decayed.

    Layers stacked for a scan have one leading dimension more than `logical_axes` names.
    """


def param(value: jax.Array, axes: LogicalAxes, *, decay: bool = True) -> Param:
    """A `Param` whose dimensions are the logical `axes`; decay=False: no weight decay."""
    return Param(value, logical_axes=axes, weight_decay=decay)


def buffer(value: jax.Array, axes: LogicalAxes) -> Buffer:
    """A `Buffer` whose dimensions are the logical `axes`."""
    return Buffer(value, logical_axes=axes)


def logical_axes(variable: nnx.Variable) -> LogicalAxes:
    """The logical axes of every dimension of a variable, the scanned layer axis included."""
    axes = variable.get_metadata()["logical_axes"]
    return (None,) * (variable.get_value().ndim - len(axes)) + axes
