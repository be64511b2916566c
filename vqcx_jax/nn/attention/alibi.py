"""ALiBi as an encoding."""

import jax

from vqcx_jax.config import schema
from vqcx_jax.nn.attention.base import Encoding
from vqcx_jax.ops import attention as ops


class AlibiEncoding(Encoding):
    """Queries and keys as they are, and a penalty proportional to distance."""

    def __init__(self, num_heads: int, head_dim: int, rules: schema.ShardingRules):
        super().__init__(head_dim, rules)
        self.num_heads = num_heads

    def slopes(self) -> jax.Array:
        """The published ones."""
        return ops.alibi_slopes(self.num_heads)
