"""PoPE as an encoding."""

import jax.numpy as jnp

from vqcx_jax.config import schema
from vqcx_jax.nn.attention.base import PER_HEAD
from vqcx_jax.nn.attention.rotary import Adapt, RotaryEncoding
from vqcx_jax.nn.variables import param
from vqcx_jax.ops import attention as ops


class PopeEncoding(RotaryEncoding):
    """`ops.attention.pope`: a bias of every query head and coordinate, (H, d), starts at 0."""

    def __init__(
        self,
        attention: schema.PopeAttention,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
    ):
        super().__init__(attention, num_kv_heads, head_dim, rules, num_planes=head_dim)
        self.key_width = 2 * head_dim
        self.bias = param(jnp.zeros((num_heads, head_dim), jnp.float32), PER_HEAD, decay=False)

    def _adapt(self) -> Adapt:
        return ops.pope_queries_and_keys, (self.bias,)
