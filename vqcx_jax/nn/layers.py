"""The parts of a transformer block that are the same for every attention and head."""

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import ShardingRules
from vqcx_jax.nn.variables import param
from vqcx_jax.sharding import constrain, einsum, take_rows

ROWS = ("batch", "sequence")
HIDDEN = (*ROWS, None)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; float32 inside (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, *, epsilon: float, rules: ShardingRules):
        self.scale = param(jnp.ones((dim,), jnp.float32), ("embed",), decay=False)
        self.epsilon = epsilon
        self.rules = rules

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """The normalised x, in its dtype."""
        x = x_BxTxD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        scale = constrain(self.scale[...], (None,), self.rules)
        return (x * scale).astype(x_BxTxD.dtype)


class Embedding(nnx.Module):
    """Token id -> row of a (V, D) table."""

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        dtype: jnp.dtype,
        rules: ShardingRules,
        rngs: nnx.Rngs,
    ):
        table = 0.02 * jax.random.normal(rngs.params(), (vocab_size, dim), jnp.float32)
        self.table = param(table, ("vocab", "embed"))
        self.dtype = dtype
        self.rules = rules

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Rows of the tokens, (B, T, D) in the compute dtype."""
        return embed(self.table[...].astype(self.dtype), tokens_BxT, self.rules)


def embed(table_VxD: jax.Array, tokens_BxT: jax.Array, rules: ShardingRules) -> jax.Array:
    """Rows of the tokens, (B, T, D)."""
    table_VxD = constrain(table_VxD, ("vocab", None), rules)
    return take_rows(table_VxD, tokens_BxT, HIDDEN, rules)


class MLP(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down (Shazeer 2020)."""

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        *,
        num_layers: int,
        dtype: jnp.dtype,
        rules: ShardingRules,
        rngs: nnx.Rngs,
    ):
        self.gate = param(fan_in_normal(rngs.params(), (dim, mlp_dim), dim), ("embed", "mlp"))
        self.up = param(fan_in_normal(rngs.params(), (dim, mlp_dim), dim), ("embed", "mlp"))
        down = residual_normal(rngs.params(), (mlp_dim, dim), mlp_dim, num_layers)
        self.down = param(down, ("mlp", "embed"))
        self.dtype = dtype
        self.rules = rules

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        gate_DxF = constrain(self.gate[...].astype(self.dtype), (None, "mlp"), self.rules)
        up_DxF = constrain(self.up[...].astype(self.dtype), (None, "mlp"), self.rules)
        down_FxD = constrain(self.down[...].astype(self.dtype), ("mlp", None), self.rules)
        y_BxTxF = jax.nn.silu(x_BxTxD @ gate_DxF) * (x_BxTxD @ up_DxF)
        return einsum("btf,fd->btd", y_BxTxF, down_FxD, HIDDEN, self.rules)


def fan_in_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal with standard deviation 1/sqrt(fan_in), float32."""
    return jax.random.normal(key, shape, jnp.float32) / fan_in**0.5


def residual_normal(
    key: jax.Array, shape: tuple[int, ...], fan_in: int, num_layers: int
) -> jax.Array:
    """`fan_in_normal` for weights that write to the residual stream, 2 * num_layers times.

    The factor 1/sqrt(2 num_layers) keeps the stream's variance from growing with depth (GPT-2).
    """
    return fan_in_normal(key, shape, fan_in) / (2 * num_layers) ** 0.5
