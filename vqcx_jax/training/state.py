"""What a training step reads and writes, and how it is made sharded from the start."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqcx_jax.config import schema
from vqcx_jax.maps import TokenMap
from vqcx_jax.nn import Transformer, functional
from vqcx_jax.nn.build import abstract_model, build_model
from vqcx_jax.nn.functional import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step counts updates done (int32 ()); buffers are saved but never trained.

    The same tree also holds the shardings of these arrays, or their jax.ShapeDtypeStructs.
    """

    step: Any
    params: Tree
    buffers: Tree
    opt_state: optax.OptState


def state_shardings(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: schema.ShardingRules,
) -> TrainState:
    """A `TrainState` of shardings; optimizer moments lie as their parameters do."""
    params, buffers = functional.shardings(model, mesh, rules)
    _, abstract_params, _ = functional.split(model)
    replicated = jax.NamedSharding(mesh, jax.P())
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params),
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, buffers, opt_state)


def init_state(
    config: schema.Config,
    token_map: TokenMap | None,
    optimizer: optax.GradientTransformation,
    shardings: TrainState,
) -> TrainState:
    """Fresh parameters from `config.train.seed`, each made where it will live."""

    def init(key: jax.Array) -> TrainState:
        _, params, buffers = functional.split(build_model(config, token_map, key))
        return TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params))

    # With Explicit axes random numbers would be made whole on every device, then cut.
    sharded_init = jax.sharding.auto_axes(init, out_sharding=shardings)
    return jax.jit(sharded_init, out_shardings=shardings)(jax.random.key(config.train.seed))


def abstract_state(
    config: schema.Config, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """`init_state` as jax.ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    _, params, buffers = functional.split(abstract_model(config))
    shapes = jax.eval_shape(
        lambda: TrainState(jnp.zeros((), jnp.int32), params, buffers, optimizer.init(params))
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
