"""Masks and the softmax-weighted sum that every attention here ends in."""

import jax
import jax.numpy as jnp

from vqcx_jax.errors import UserError
from vqcx_jax.ops.soft_cap import soft_cap as capped


def causal_mask(num_queries: int, num_keys: int, first_query: jax.Array | int = 0) -> jax.Array:
    """True where query t, standing at index first_query + t, may see key s: s <= index.

    Returns:
        bool (1, 1, T, S).
    """
    q_index = first_query + jnp.arange(num_queries)
    return (jnp.arange(num_keys) <= q_index[:, None])[None, None]


def window_mask(
    num_queries: int, num_keys: int, window: int, first_query: jax.Array | int = 0
) -> jax.Array:
    """True where key s is fewer than `window` indices away from query t, at first_query + t.

    Together with `causal_mask` a query sees the last `window` keys, its own among them; without, as
    many on either side. Indices, not positions: in packed rows it goes with `segment_mask`.

    Returns:
        bool (1, 1, T, S).

    Raises:
        UserError: window is below 1.
    """
    if window < 1:
        raise UserError(f"window={window}: must be at least 1, the query's own key")
    q_index = first_query + jnp.arange(num_queries)
    return (jnp.abs(q_index[:, None] - jnp.arange(num_keys)) < window)[None, None]


def segment_mask(q_segment_ids: jax.Array, k_segment_ids: jax.Array) -> jax.Array:
    """True where query and key belong to the same packed document.

    Args:
        q_segment_ids: int (B, T). k_segment_ids: int (B, S).

    Returns:
        bool (B, 1, T, S).
    """
    return (q_segment_ids[:, :, None] == k_segment_ids[:, None, :])[:, None]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    empty_rows: bool = False,
) -> jax.Array:
    """softmax(cap(scale q k^T) + bias) v over the keys that `mask` shows; float32 softmax.

    Args:
        q: (B, T, H, D). k: (B, S, K, D), with H a multiple of K (grouped-query attention: query
            head h reads key head h // (H / K)).
        v: (B, S, K, d). D is d, or another width for encodings that widen queries and keys.
        mask: bool, four axes that broadcast to (B, H, T, S); None shows all keys to all queries.
        scale: of the scores; 1 / sqrt(d) if not given, which is an error where D is not d.
        bias: float, broadcastable to (B, H, T, S).
        soft_cap: scores become soft_cap tanh(score / soft_cap), before bias and mask.
        empty_rows: some query may see no key; its output is then 0, and so are its gradients.
            Without it every query must see one: the output of an empty row is meaningless.

    Returns:
        (B, T, H, d) in q's dtype.

    Raises:
        UserError: D is not d, and scale is not given.
    """
    head_dim = v.shape[-1]
    if scale is None:
        if q.shape[-1] != head_dim:
            raise UserError(
                f"scale=None: must be given for queries of width {q.shape[-1]} and values of "
                f"width {head_dim}"
            )
        scale = head_dim**-0.5
    if q.shape[-1] == head_dim and soft_cap is None:
        out = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale)
    else:
        out = _attend_any_width(q, k, v, mask, scale, bias, soft_cap)
    if empty_rows and mask is not None:
        out = jnp.where(jnp.moveaxis(jnp.any(mask, axis=-1), 1, 2)[..., None], out, 0.0)
    return out


def attention_weights(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """The softmax of `attend` by itself, float32 (B, H, T, S)."""
    num_batch, num_queries, num_heads, _ = q.shape
    num_keys, num_kv_heads = k.shape[1:3]
    # Without the preset the backward pass would multiply float32 by bfloat16.
    is_bfloat16 = q.dtype == jnp.bfloat16
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if is_bfloat16 else None
    scores = jnp.einsum(
        "btkgd,bskd->bkgts",
        q.reshape(num_batch, num_queries, num_kv_heads, -1, q.shape[-1]),
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(num_batch, num_heads, num_queries, num_keys)
    scores = capped(scores * scale, soft_cap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _attend_any_width(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float,
    bias: jax.Array | None,
    soft_cap: float | None,
) -> jax.Array:
    """What `jax.nn.dot_product_attention` cannot do, with its precision."""
    weights = attention_weights(q, k, mask, scale=scale, bias=bias, soft_cap=soft_cap)
    num_batch, num_heads, num_queries, num_keys = weights.shape
    grouped_shape = (num_batch, k.shape[2], -1, num_queries, num_keys)
    weights = weights.astype(v.dtype).reshape(grouped_shape)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(num_batch, num_queries, num_heads, v.shape[-1]).astype(q.dtype)
