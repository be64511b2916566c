"""Self-attention with complex (CMHA) or rotary queries and keys, grouped-query, with a KV cache."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config.schema import (
    ComplexAttention,
    RopeAttention,
    ShardingRules,
    published_delta_std,
)
from vqcx_jax.nn.layers import HIDDEN, fan_in_normal, residual_normal
from vqcx_jax.nn.variables import param
from vqcx_jax.ops import attention as ops
from vqcx_jax.sharding import LogicalAxes, constrain, einsum, per_device

_ROWS = ("batch", None)
_TABLE = ("batch", None, None)
_HEADS = ("batch", None, "heads", None)
_PHASES = ("heads", None)


class KVCache(NamedTuple):
    """Keys (already rotated) and values of one layer, or of all layers stacked in front.

    k, v: (..., B, S, K, d) with room for S positions.
    """

    k: jax.Array
    v: jax.Array


class Rotary(NamedTuple):
    """Position rotations shared by all layers: float32 (B, T, P) each."""

    cos: jax.Array
    sin: jax.Array


class Attention(nnx.Module):
    """Multi-head attention; `attention` says how queries and keys become position-aware.

    The complex form adds delta (K, P) and bias (H, P): delta belongs to the key head, since one
    key serves every query head of its group; the bias only touches queries.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        attention: ComplexAttention | RopeAttention,
        num_layers: int,
        dtype: jnp.dtype,
        rules: ShardingRules,
        rngs: nnx.Rngs,
    ):
        q_shape, kv_shape = (dim, num_heads, head_dim), (dim, num_kv_heads, head_dim)
        o_shape = (num_heads, head_dim, dim)
        self.q = param(fan_in_normal(rngs.params(), q_shape, dim), ("embed", "heads", None))
        self.k = param(fan_in_normal(rngs.params(), kv_shape, dim), ("embed", "heads", None))
        self.v = param(fan_in_normal(rngs.params(), kv_shape, dim), ("embed", "heads", None))
        out = residual_normal(rngs.params(), o_shape, num_heads * head_dim, num_layers)
        self.out = param(out, ("heads", None, "embed"))
        if isinstance(attention, ComplexAttention):
            delta = jnp.ones((num_kv_heads, head_dim // 2), jnp.float32)
            if attention.delta_init == "published":
                noise = jax.random.normal(rngs.params(), delta.shape, jnp.float32)
                delta = noise * published_delta_std(head_dim)
            bias = jnp.zeros((num_heads, head_dim // 2), jnp.float32)
            self.delta = param(delta, ("heads", None), decay=False)
            self.bias = param(bias, ("heads", None), decay=False)
        self.is_complex = isinstance(attention, ComplexAttention)
        self.dtype = dtype
        self.rules = rules

    def __call__(
        self,
        x_BxTxD: jax.Array,
        rotary: Rotary,
        segment_ids_BxT: jax.Array,
        cache: KVCache | None = None,
        cache_length: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache]:
        """Causal attention within segments.

        Args:
            x_BxTxD: inputs.
            rotary: rotations at the inputs' positions.
            segment_ids_BxT: packed document of each input; ignored with a cache.
            cache: keys and values of earlier positions, `cache_length` of them filled.

        Returns:
            (B, T, D) and the keys and values: the updated cache, or this call's own.
        """
        q_BxTxHxd = self._project(self.q, x_BxTxD)
        k_BxTxKxd = self._project(self.k, x_BxTxD)
        v_BxTxKxd = self._project(self.v, x_BxTxD)
        q_BxTxHxd, k_BxTxKxd = self._encode_positions(q_BxTxHxd, k_BxTxKxd, rotary)

        if cache is None:
            cache = KVCache(k_BxTxKxd, v_BxTxKxd)
            (y_BxTxHxd,) = per_device(
                _attend_packed, (_HEADS, _HEADS, _HEADS, _ROWS), (_HEADS,), self.rules
            )(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, segment_ids_BxT)
        else:
            y_BxTxHxd, *updated = per_device(
                _attend_cached,
                (_HEADS, _HEADS, _HEADS, _HEADS, _HEADS, ()),
                (_HEADS, _HEADS, _HEADS),
                self.rules,
            )(q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, *cache, jnp.asarray(cache_length, jnp.int32))
            cache = KVCache(*updated)
        out_HxdxD = constrain(self.out[...].astype(self.dtype), ("heads", None, None), self.rules)
        return einsum("bthk,hkd->btd", y_BxTxHxd, out_HxdxD, HIDDEN, self.rules), cache

    def _project(self, weight: nnx.Param, x_BxTxD: jax.Array) -> jax.Array:
        w = constrain(weight[...].astype(self.dtype), (None, "heads", None), self.rules)
        return jnp.einsum("btd,dhk->bthk", x_BxTxD, w)

    def _encode_positions(
        self, q_BxTxHxd: jax.Array, k_BxTxKxd: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, jax.Array]:
        args = [q_BxTxHxd, k_BxTxKxd, *rotary]
        axes: list[LogicalAxes] = [_HEADS, _HEADS, _TABLE, _TABLE]
        encode: Callable[..., tuple[jax.Array, jax.Array]] = ops.rope_queries_and_keys
        if self.is_complex:
            encode = ops.complex_queries_and_keys
            args += [self.delta[...], self.bias[...]]
            axes += [_PHASES, _PHASES]
        return per_device(encode, axes, (_HEADS, _HEADS), self.rules)(*args)


def _attend_packed(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array]:
    mask = ops.causal_mask(q.shape[1], k.shape[1]) & ops.segment_mask(segment_ids, segment_ids)
    return (ops.attend(q, k, v, mask),)


def _attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cached_k: jax.Array,
    cached_v: jax.Array,
    cache_length: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    start = (0, cache_length, 0, 0)
    cached_k = jax.lax.dynamic_update_slice(cached_k, k.astype(cached_k.dtype), start)
    cached_v = jax.lax.dynamic_update_slice(cached_v, v.astype(cached_v.dtype), start)
    mask = ops.causal_mask(q.shape[1], cached_k.shape[1], cache_length)
    return ops.attend(q, cached_k, cached_v, mask), cached_k, cached_v
