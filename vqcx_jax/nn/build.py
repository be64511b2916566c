"""From a resolved config to a model."""

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.assignment import Assignment
from vqcx_jax.config import schema
from vqcx_jax.nn.transformer import Transformer


def build_model(
    config: schema.Config,
    assignment: Assignment | None,
    key: jax.Array,
    rules: schema.ShardingRules | None = None,
) -> Transformer:
    """The model of a resolved config.

    Args:
        assignment: the token map of a VQ head. None: for a VQ head a map of zeros is put in, for
            models whose arrays come from a checkpoint.
        key: a typed PRNG key.
        rules: default `config.sharding`.
    """
    codes_of_tokens = centroids = None
    if isinstance(config.model.head, schema.VQHead):
        if assignment is None:
            codes_of_tokens = jnp.zeros((config.model.known_vocab_size(),), jnp.int32)
        else:
            codes_of_tokens = jnp.asarray(assignment.codes_of_tokens)
            if assignment.centroids is not None:
                centroids = jnp.asarray(assignment.centroids)
    return Transformer(
        config.model,
        assignment=codes_of_tokens,
        codes=centroids,
        rules=rules or config.sharding,
        rngs=nnx.Rngs(params=key),
    )


def abstract_model(config: schema.Config, rules: schema.ShardingRules | None = None) -> Transformer:
    """`build_model` with shapes and dtypes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: build_model(config, None, jax.random.key(0), rules))
