"""Self-attention, grouped-query, with a KV cache."""

import functools
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from vqcx_jax.config import check_attention, schema
from vqcx_jax.errors import UserError
from vqcx_jax.nn.attention.base import HEADS, Phases, QueriesAndKeys, TokenInfo
from vqcx_jax.nn.attention.make import make_encoding
from vqcx_jax.nn.layers import HIDDEN, ROWS, fan_in_normal, residual_normal
from vqcx_jax.nn.variables import param
from vqcx_jax.ops import attention as ops
from vqcx_jax.ops import dispatch, flash_attention, flash_decoding
from vqcx_jax.ops.checks import are_known, check_positive
from vqcx_jax.sharding import (
    LogicalAxes,
    block_index,
    constrain,
    einsum,
    mesh_axes,
    per_device,
)

# Keys and values of whole rows, and their segments.
_ALL_KEYS: LogicalAxes = ("batch", None, "heads", None)
_ALL_ROWS: LogicalAxes = ("batch", None)
_STACKED: LogicalAxes = (None, *_ALL_KEYS)  # Of all layers.


class KVCache(NamedTuple):
    """Keys (already encoded) and values of one layer, or of all layers stacked in front.

    k: (..., B, S, K, key_width), v: (..., B, S, K, d), with room for S positions.
    """

    k: jax.Array
    v: jax.Array


class Attention(nnx.Module):
    """Multi-head attention; `attention` says how queries and keys become position-aware.

    Args:
        dim: D, of inputs and outputs.
        num_heads, num_kv_heads: H query heads, K key heads; K divides H.
        head_dim: d.
        attention: one of `config.schema.AttentionConfig`.
        causal: False lets a token see those after it in its document, too.
        num_layers: that write to the residual stream, for the scale of the output projection.
        dtype: of activations and matrix products.
        rules: how logical axes are sharded when a mesh is set.
        rngs: a `params` stream.

    Raises:
        UserError: sizes or options that do not fit.

    Example:
        attention = Attention(
            512, num_heads=8, num_kv_heads=8, head_dim=64,
            attention=schema.ComplexAttention(), rngs=nnx.Rngs(0),
        )
        y_BxTxD, _ = attention(x_BxTxD)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        attention: schema.AttentionConfig,
        causal: bool = True,
        num_layers: int = 1,
        dtype: jnp.dtype = jnp.float32,
        rules: schema.ShardingRules | None = None,
        rngs: nnx.Rngs,
    ):
        rules = rules or schema.ShardingRules()
        if not isinstance(attention, get_args(schema.AttentionConfig)):
            raise UserError(
                f"attention={attention!r}: must be one of config.schema, such as PopeAttention()"
            )
        check_positive(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        if head_dim % 2:
            raise UserError(f"head_dim={head_dim}: must be even, attention rotates pairs")
        if num_heads % num_kv_heads:
            raise UserError(f"num_kv_heads={num_kv_heads}: must divide num_heads={num_heads}")
        check_attention(attention)
        q_shape, kv_shape = (dim, num_heads, head_dim), (dim, num_kv_heads, head_dim)
        o_shape = (num_heads, head_dim, dim)
        self.q = param(fan_in_normal(rngs.params(), q_shape, dim), ("embed", "heads", None))
        self.k = param(fan_in_normal(rngs.params(), kv_shape, dim), ("embed", "heads", None))
        self.v = param(fan_in_normal(rngs.params(), kv_shape, dim), ("embed", "heads", None))
        out = residual_normal(rngs.params(), o_shape, num_heads * head_dim, num_layers)
        self.out = param(out, ("heads", None, "embed"))
        if attention.qk_norm:
            self.q_gain = param(jnp.ones((head_dim,), jnp.float32), (None,), decay=False)
            self.k_gain = param(jnp.ones((head_dim,), jnp.float32), (None,), decay=False)
        self.encoding = make_encoding(
            attention,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rules=rules,
            rngs=rngs,
        )
        self.options = attention
        self.causal = causal
        self.dtype = jnp.dtype(dtype)
        self.rules = rules

    def __call__(
        self,
        x_BxTxD: jax.Array,
        info: TokenInfo | None = None,
        cache: KVCache | None = None,
        cache_length: jax.Array | int = 0,
        layer: jax.Array | int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Attention within segments.

        Args:
            x_BxTxD: inputs.
            info: from `self.encoding.info`. None: every row is one document and begins at
                position cache_length.
            cache: keys and values of earlier positions, `cache_length` of them filled. Positions
                past its end overwrite the last ones, where cache_length is traced; else they are
                an error.
            layer: None, or the cache is that of all layers and this the index of its own.

        Returns:
            (B, T, D) and the keys and values: the updated cache, or this call's own.

        Raises:
            UserError: a cache that does not fit; a cache for attention that is not causal, for
                packed documents, or where the sequence is sharded.
        """
        if cache is not None:
            self._check_cache(cache, x_BxTxD.shape[1], cache_length)
            if info is not None and info.segment_ids is not None:
                raise UserError("info: must have segment_ids=None with a cache, of one document")
        x_BxTxD = constrain(x_BxTxD.astype(self.dtype), HIDDEN, self.rules)
        info = info or self._one_document(x_BxTxD, cache_length)
        q_BxTxHxd, k_BxTxKxd = self._raw_queries_and_keys(x_BxTxD)
        raw = (q_BxTxHxd, k_BxTxKxd)
        q_BxTxHxd, k_BxTxKxd = self.encoding(*raw, info)
        v_BxTxKxd = self._project(self.v, x_BxTxD)
        if cache is None:
            cache = KVCache(k_BxTxKxd, v_BxTxKxd)
            encoded = (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd)
            implementations = {
                dispatch.XLA: functools.partial(self.attend, *encoded, info.segment_ids),
                dispatch.PALLAS_TPU: functools.partial(
                    self._attend_by_flash,
                    raw,
                    (q_BxTxHxd, k_BxTxKxd),
                    v_BxTxKxd,
                    info,
                ),
                dispatch.CUDNN: functools.partial(
                    self._attend_by_cudnn, *encoded, info.segment_ids
                ),
            }
            asked = self.options.implementation
            named = None if asked == "auto" else asked
            y_BxTxHxd = dispatch.run("Attention", implementations, named)
        else:
            new = (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd)
            y_BxTxHxd, cache = self._extend(*new, cache, cache_length, layer)
        out_HxdxD = constrain(self.out[...].astype(self.dtype), ("heads", None, None), self.rules)
        return einsum("bthk,hkd->btd", y_BxTxHxd, out_HxdxD, HIDDEN, self.rules), cache

    def queries_and_keys(self, x_BxTxD: jax.Array, info: TokenInfo) -> QueriesAndKeys:
        """Encoded queries (B, T, H, key_width) and keys (B, T, K, key_width).

        The scores are their dot products times `self.encoding.scale`, but for ALiBi's penalty and
        a soft-cap.
        """
        return self.encoding(*self._raw_queries_and_keys(x_BxTxD), info)

    def attend(
        self,
        q_BxTxHxd: jax.Array,
        k_BxTxKxd: jax.Array,
        v_BxTxKxd: jax.Array,
        segment_ids_BxT: jax.Array | None,
    ) -> jax.Array:
        """(B, T, H, d) from encoded queries and keys, within segments."""
        if segment_ids_BxT is None:
            segment_ids_BxT = self._no_segments(q_BxTxHxd)
        slopes, slope_axes = self._slopes()
        all_keys = [constrain(x, _ALL_KEYS, self.rules) for x in (k_BxTxKxd, v_BxTxKxd)]
        all_segments = constrain(segment_ids_BxT, _ALL_ROWS, self.rules)
        in_axes = (HEADS, _ALL_KEYS, _ALL_KEYS, ROWS, _ALL_ROWS, *slope_axes)
        (y_BxTxHxd,) = per_device(self._attend_packed, in_axes, (HEADS,), self.rules)(
            q_BxTxHxd, *all_keys, segment_ids_BxT, all_segments, *slopes
        )
        return y_BxTxHxd

    def weights(self, x_BxTxD: jax.Array, info: TokenInfo) -> jax.Array:
        """The softmax that `self(x_BxTxD, info)` takes, float32 (B, H, T, T): to be looked at.

        All of it is on one device: no mesh may be set.
        """
        num_tokens = x_BxTxD.shape[1]
        mask = self._mask(num_tokens, num_tokens, 0)
        segment_ids_BxT = info.segment_ids
        if segment_ids_BxT is None:
            segment_ids_BxT = self._no_segments(x_BxTxD)
        in_segment = ops.segment_mask(segment_ids_BxT, segment_ids_BxT)
        return ops.attention_weights(
            *self.queries_and_keys(x_BxTxD, info),
            in_segment if mask is None else in_segment & mask,
            scale=self.encoding.scale,
            bias=self._bias(num_tokens, num_tokens, 0, *self._slopes()[0]),
            soft_cap=self.options.logit_soft_cap,
        )

    def _raw_queries_and_keys(self, x_BxTxD: jax.Array) -> QueriesAndKeys:
        q_BxTxHxd = self._project(self.q, x_BxTxD)
        k_BxTxKxd = self._project(self.k, x_BxTxD)
        if self.options.qk_norm:
            q_BxTxHxd = ops.qk_norm(q_BxTxHxd, self.q_gain[...])
            k_BxTxKxd = ops.qk_norm(k_BxTxKxd, self.k_gain[...])
        return q_BxTxHxd, k_BxTxKxd

    def _attend_by_flash(
        self,
        raw: QueriesAndKeys,
        encoded: QueriesAndKeys,
        v_BxTxKxd: jax.Array,
        info: TokenInfo,
    ) -> jax.Array:
        """`attend` by kernels, which encode raw queries and keys themselves where they can."""
        if self.encoding.slopes() is not None:
            raise dispatch.NotSupported(f"kind={self.options.kind}: kernels have no slopes")
        phases, q_and_k = self.encoding.phases(), raw
        if phases is None:  # Not to be turned any more.
            zeros_P = jnp.zeros((encoded[0].shape[-1] // 2,), jnp.float32)
            phases, q_and_k = Phases({"frequencies": zeros_P}, {"frequencies": (None,)}), encoded
        if mesh_axes("sequence", self.rules):
            raise dispatch.NotSupported("the sequence is sharded: kernels need it whole")

        def attend(
            q: jax.Array,
            k: jax.Array,
            v: jax.Array,
            positions: jax.Array,
            *others: jax.Array,
        ) -> tuple[jax.Array]:
            num_arrays = len(phases.arrays)
            named = dict(zip(phases.arrays, others[:num_arrays], strict=True))
            y = flash_attention.tpu.attend(
                q,
                k,
                v,
                frequencies=named["frequencies"],
                delta=named.get("delta"),
                bias=named.get("bias"),
                positions=positions,
                segment_ids=others[num_arrays] if segments else None,
                scale=self.encoding.scale,
                amplitude=phases.amplitude,
                causal=self.causal,
                window=self.options.window,
                soft_cap=self.options.logit_soft_cap,
            )
            return (y,)

        arrays = [constrain(x, phases.axes[name], self.rules) for name, x in phases.arrays.items()]
        segments = () if info.segment_ids is None else (info.segment_ids,)
        of_phases = (phases.axes[name] for name in phases.arrays)
        axes = (HEADS, HEADS, HEADS, ROWS, *of_phases, *(ROWS for _ in segments))
        (y_BxTxHxd,) = per_device(attend, axes, (HEADS,), self.rules)(
            *q_and_k, v_BxTxKxd, info.positions, *arrays, *segments
        )
        return y_BxTxHxd

    def _attend_by_cudnn(
        self,
        q_BxTxHxd: jax.Array,
        k_BxTxKxd: jax.Array,
        v_BxTxKxd: jax.Array,
        segment_ids_BxT: jax.Array | None,
    ) -> jax.Array:
        """`attend` by cuDNN."""
        if self.encoding.slopes() is not None:
            raise dispatch.NotSupported(f"kind={self.options.kind}: cuDNN has no slopes")
        if mesh_axes("sequence", self.rules):
            raise dispatch.NotSupported("the sequence is sharded: cuDNN needs it whole")

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, *segment_ids: jax.Array
        ) -> tuple[jax.Array]:
            y = ops.attend_by_cudnn(
                q,
                k,
                v,
                segment_ids[0] if segment_ids else None,
                scale=self.encoding.scale,
                causal=self.causal,
                window=self.options.window,
                soft_cap=self.options.logit_soft_cap,
            )
            return (y,)

        segments = () if segment_ids_BxT is None else (segment_ids_BxT,)
        axes = (HEADS, HEADS, HEADS, *(ROWS for _ in segments))
        (y_BxTxHxd,) = per_device(attend, axes, (HEADS,), self.rules)(
            q_BxTxHxd, k_BxTxKxd, v_BxTxKxd, *segments
        )
        return y_BxTxHxd

    def _extend(
        self,
        q_BxTxHxd: jax.Array,
        k_BxTxKxd: jax.Array,
        v_BxTxKxd: jax.Array,
        cache: KVCache,
        cache_length: jax.Array | int,
        layer: jax.Array | int | None,
    ) -> tuple[jax.Array, KVCache]:
        new = (q_BxTxHxd, k_BxTxKxd, v_BxTxKxd)
        if layer is None:
            stacked = KVCache(*(x[None] for x in cache))
            y_BxTxHxd, stacked = self._extend(*new, stacked, cache_length, 0)
            return y_BxTxHxd, KVCache(*(x[0] for x in stacked))
        slopes, slope_axes = self._slopes()
        in_axes = (*(_ALL_KEYS,) * 3, _STACKED, _STACKED, (), (), *slope_axes)
        out_axes = (_ALL_KEYS, _STACKED, _STACKED)
        indices = [jnp.asarray(x, jnp.int32) for x in (cache_length, layer)]
        y_BxTxHxd, *updated = per_device(self._attend_cached, in_axes, out_axes, self.rules)(
            *new, *cache, *indices, *slopes
        )
        return y_BxTxHxd, KVCache(*updated)

    def _slopes(self) -> tuple[tuple[jax.Array, ...], tuple[LogicalAxes, ...]]:
        """An argument more for `per_device`, or none, and its axes."""
        slopes, axes = self.encoding.slopes(), ("heads",)
        return ((), ()) if slopes is None else ((constrain(slopes, axes, self.rules),), (axes,))

    def _project(self, weight: nnx.Param, x_BxTxD: jax.Array) -> jax.Array:
        w = constrain(weight[...].astype(self.dtype), (None, "heads", None), self.rules)
        return jnp.einsum("btd,dhk->bthk", x_BxTxD, w)

    def _one_document(self, x_BxTxD: jax.Array, first: jax.Array | int) -> TokenInfo:
        positions_BxT = (
            jnp.zeros(x_BxTxD.shape[:2], jnp.int32) + first + jnp.arange(x_BxTxD.shape[1])
        )
        return self.encoding.info(None, constrain(positions_BxT, ROWS, self.rules))

    def _no_segments(self, x: jax.Array) -> jax.Array:
        """Zeros for the rows of x (B, T, ...)."""
        return constrain(jnp.zeros(x.shape[:2], jnp.int32), ROWS, self.rules)

    def _check_cache(self, cache: KVCache, num_tokens: int, cache_length: jax.Array | int) -> None:
        if not self.causal:
            raise UserError("cache: must be None for causal=False, a cache holds what came before")
        if mesh_axes("sequence", self.rules):
            raise UserError("cache: needs the sequence whole, sharding.sequence must be ()")
        *_, room, num_heads, key_width = cache.k.shape
        _, num_kv_heads, value_width = self.v.shape
        expected = num_kv_heads, self.encoding.key_width
        if (num_heads, key_width) != expected or cache.v.shape[-2:] != (num_kv_heads, value_width):
            raise UserError(
                f"cache: has {num_heads} heads with keys of {key_width} and values of "
                f"{cache.v.shape[-1]}; must have {num_kv_heads} with keys of "
                f"{self.encoding.key_width} and values of {value_width}"
            )
        first = int(cache_length) if are_known(cache_length) else 0
        if first < 0:
            raise UserError(f"cache_length={first}: must be at least 0")
        if first + num_tokens > room:
            raise UserError(
                f"cache: has room for {room} positions; {first} and {num_tokens} more do not fit"
            )

    # The functions below see one device's queries: of its rows, heads and part of the sequence.

    def _attend_packed(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_segment_ids: jax.Array,
        k_segment_ids: jax.Array,
        *slopes: jax.Array,
    ) -> tuple[jax.Array]:
        first = block_index("sequence", self.rules) * q.shape[1]
        mask = self._mask(q.shape[1], k.shape[1], first)
        in_segment = ops.segment_mask(q_segment_ids, k_segment_ids)
        mask = in_segment if mask is None else in_segment & mask
        return (self._attend(q, k, v, mask, first, *slopes),)

    def _attend_cached(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cached_k: jax.Array,
        cached_v: jax.Array,
        cache_length: jax.Array,
        layer: jax.Array,
        *slopes: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        start = (layer, 0, cache_length, 0, 0)
        cached_k = jax.lax.dynamic_update_slice(cached_k, k[None].astype(cached_k.dtype), start)
        cached_v = jax.lax.dynamic_update_slice(cached_v, v[None].astype(cached_v.dtype), start)
        y = flash_decoding.attend(
            q,
            cached_k,
            cached_v,
            cache_length,
            layer=layer,
            scale=self.encoding.scale,
            window=self.options.window,
            soft_cap=self.options.logit_soft_cap,
            slopes=slopes[0] if slopes else None,
            implementation=self._named_for_cache(q.shape[1]),
        )
        return y, cached_k, cached_v

    def _named_for_cache(self, num_queries: int) -> str | None:
        """The kernel has a cache's last few queries; a prompt, and what cuDNN is for, has none."""
        asked = self.options.implementation
        if asked == "auto":
            return None
        is_short = num_queries <= flash_decoding.MAX_QUERIES
        return asked if asked == dispatch.PALLAS_TPU and is_short else dispatch.XLA

    def _mask(self, num_queries: int, num_keys: int, first: jax.Array | int) -> jax.Array | None:
        mask = ops.causal_mask(num_queries, num_keys, first) if self.causal else None
        if self.options.window is None:
            return mask
        window = ops.window_mask(num_queries, num_keys, self.options.window, first)
        return window if mask is None else mask & window

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        first: jax.Array | int,
        *slopes: jax.Array,
    ) -> jax.Array:
        bias = self._bias(q.shape[1], k.shape[1], first, *slopes)
        scale, soft_cap = self.encoding.scale, self.options.logit_soft_cap
        return ops.attend(q, k, v, mask, scale=scale, bias=bias, soft_cap=soft_cap)

    def _bias(
        self, num_queries: int, num_keys: int, first: jax.Array | int, *slopes: jax.Array
    ) -> jax.Array | None:
        if not slopes:
            return None
        q_index, k_index = first + jnp.arange(num_queries), jnp.arange(num_keys)
        return ops.alibi_bias(slopes[0], q_index[None], k_index[None])
