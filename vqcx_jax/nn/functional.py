"""A module as plain nested dicts of arrays: what the trainer differentiates, shards and saves."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.variables import Param, logical_axes
from vqcx_jax.sharding import named_sharding

Tree = dict[str, Any]


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """Graph definition, trained arrays and buffers; `nnx.merge(*split(module))` undoes it."""
    graphdef, params, buffers = _split(module)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def shardings(
    module: nnx.Module, mesh: jax.sharding.Mesh, rules: ShardingRules
) -> tuple[Tree, Tree]:
    """The sharding of every array of `split`, from the logical axes it was declared with."""
    _, params, buffers = _split(module)

    def of(state: nnx.State) -> Tree:
        return _map_variables(lambda v: named_sharding(mesh, logical_axes(v), rules), state)

    return of(params), of(buffers)


def decay_mask(module: nnx.Module) -> Tree:
    """True for every trained array that weight decay applies to."""
    return _map_variables(lambda v: v.get_metadata()["weight_decay"], nnx.state(module, Param))


def _split(module: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    graphdef, params, buffers = nnx.split(module, Param, ...)  # type: ignore[misc]
    return graphdef, params, buffers


def _map_variables(function: Callable[[nnx.Variable], Any], state: nnx.State) -> Tree:
    tree: Tree = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, name = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = function(variable)
    return tree
