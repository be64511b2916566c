"""The forms of complex attention: rotary encodings with an Adapt of phases.

What bends query and key phases alike belongs to the key head, which serves all queries of its
group; what only touches queries belongs to the query head.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.nn.attention.base import PER_HEAD
from vqcx_jax.nn.attention.rotary import Adapt, RotaryEncoding
from vqcx_jax.nn.variables import Param, param
from vqcx_jax.ops import attention as ops


class ComplexEncoding(RotaryEncoding):
    """Adapt(AS) = delta AS + b: delta (K, P), bias (H, P)."""

    def __init__(
        self,
        attention: schema.ComplexAttention,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
        rngs: nnx.Rngs,
    ):
        super().__init__(attention, num_kv_heads, head_dim, rules)
        num_planes = head_dim // 2
        delta = jnp.ones((num_kv_heads, num_planes), jnp.float32)
        if attention.delta_init == "published":
            noise = jax.random.normal(rngs.params(), delta.shape, jnp.float32)
            delta = noise / num_planes**0.5
        self.delta = param(delta, PER_HEAD, decay=False)
        self.bias = _bias(num_heads, head_dim)
        if not attention.scaled:
            self.scale *= head_dim**0.5

    def _adapt(self) -> Adapt:
        return ops.complex_queries_and_keys, (self.delta, self.bias)


class EulerFormerEncoding(RotaryEncoding):
    """Adapt(AS) = delta AS + b for all heads: delta and bias (1,), or (P,); delta starts at 1."""

    def __init__(
        self,
        attention: schema.EulerFormerAttention,
        num_kv_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
    ):
        super().__init__(attention, num_kv_heads, head_dim, rules)
        size = 1 if attention.share_planes else head_dim // 2
        self.delta = param(jnp.ones((size,), jnp.float32), (None,), decay=False)
        self.bias = param(jnp.zeros((size,), jnp.float32), (None,), decay=False)

    def _adapt(self) -> Adapt:
        return ops.complex_queries_and_keys, (self.delta, self.bias)


class AmplitudeEncoding(RotaryEncoding):
    """Adapt(AS) = b: bias (H, P)."""

    def __init__(
        self,
        attention: schema.AmplitudeAttention,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
    ):
        super().__init__(attention, num_kv_heads, head_dim, rules)
        self.bias = _bias(num_heads, head_dim)

    def _adapt(self) -> Adapt:
        return ops.amplitude_queries_and_keys, (self.bias,)


class SmoothEncoding(RotaryEncoding):
    """A Moebius map of every phase: a (K, d), bias (H, P). Zeros, the start, are RoPE."""

    def __init__(
        self,
        attention: schema.SmoothAttention,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
    ):
        super().__init__(attention, num_kv_heads, head_dim, rules)
        self.a = param(jnp.zeros((num_kv_heads, head_dim), jnp.float32), PER_HEAD, decay=False)
        self.bias = _bias(num_heads, head_dim)

    def _adapt(self) -> Adapt:
        return ops.smooth_queries_and_keys, (self.a, self.bias)


class HarmonicEncoding(RotaryEncoding):
    """R harmonics of every phase: weights and bias (H, R, P). It starts as RoPE."""

    def __init__(
        self,
        attention: schema.HarmonicAttention,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rules: schema.ShardingRules,
    ):
        super().__init__(attention, num_kv_heads, head_dim, rules)
        self.key_width = attention.num_harmonics * head_dim
        zeros = jnp.zeros((num_heads, attention.num_harmonics, head_dim // 2), jnp.float32)
        self.weights = param(zeros.at[:, 1].set(1.0), (*PER_HEAD, None), decay=False)
        self.bias = param(zeros, (*PER_HEAD, None), decay=False)

    def _adapt(self) -> Adapt:
        return ops.harmonic_queries_and_keys, (self.weights, self.bias)


def _bias(num_heads: int, head_dim: int) -> Param:
    """Radians, 0."""
    return param(jnp.zeros((num_heads, head_dim // 2), jnp.float32), PER_HEAD, decay=False)
