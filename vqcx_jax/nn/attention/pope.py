"""PoPE as an encoding."""

import jax
import jax.numpy as jnp

from vqcx_jax.config import schema
from vqcx_jax.nn.attention.base import PER_HEAD, Encoding, QueriesAndKeys, TokenInfo
from vqcx_jax.nn.variables import param
from vqcx_jax.ops import attention as ops


class PopeEncoding(Encoding):
    """`ops.attention.pope`: a bias of every query head and coordinate, (H, d), starts at 0."""

    def __init__(
        self,
        attention: schema.PopeAttention,
        num_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
    ):
        super().__init__(head_dim, rules)
        self.key_width = 2 * head_dim
        self.rope_base = attention.rope_base
        self.bias = param(jnp.zeros((num_heads, head_dim), jnp.float32), PER_HEAD, decay=False)

    def table(self, positions: jax.Array) -> tuple[jax.Array, ...]:
        """Cosines and sines, (B, T, d)."""
        frequencies = ops.pope_frequencies(self.head_dim, self.rope_base)
        return ops.rotary_table(positions, frequencies)

    def __call__(self, q: jax.Array, k: jax.Array, info: TokenInfo) -> QueriesAndKeys:
        """See `Encoding`."""
        return self._encode(ops.pope_queries_and_keys, q, k, info.table, self.bias)
