"""From a resolved config to a model."""

import jax
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.maps import TokenMap
from vqcx_jax.nn.transformer import Transformer


def build_model(
    config: schema.Config,
    token_map: TokenMap | None,
    key: jax.Array,
    rules: schema.ShardingRules | None = None,
) -> Transformer:
    """The model of a resolved config.

    Args:
        token_map: for heads of codes, see `nn.heads.make_head`.
        key: a typed PRNG key.
        rules: default `config.sharding`.
    """
    return Transformer(
        config.model,
        token_map=token_map,
        rules=rules or config.sharding,
        rngs=nnx.Rngs(params=key),
    )


def abstract_model(config: schema.Config, rules: schema.ShardingRules | None = None) -> Transformer:
    """`build_model` with shapes and dtypes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: build_model(config, None, jax.random.key(0), rules))
