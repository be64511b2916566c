"""Attention over a KV cache, by the implementation that suits the device."""

import functools
from typing import Any

import jax

from vqcx_jax.errors import UserError
from vqcx_jax.ops import dispatch
from vqcx_jax.ops.flash_decoding import tpu, xla


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array | int,
    *,
    scale: float,
    layer: jax.Array | int | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(cap(scale q k^T) - slope (t - s)) v over the keys up to each query's own.

    Args:
        q: (B, T, H, D), encoded. Query t stands at index first + t and sees keys s <= first + t.
        k: (B, S, K, D), encoded, with H a multiple of K; query head h reads key head h // (H / K).
            What lies past first + T - 1 is not seen, whatever it is.
        v: (B, S, K, d).
        first: int32 (), at most S - T.
        scale: of the scores, before the soft-cap.
        layer: int32 (). Then k and v are those of all layers, stacked in front, and this one's are
            read where they lie.
        window: a query sees its last so many keys, its own among them. soft_cap: as in
            `attention.attend`. slopes: float (H,), of `alibi_bias`.
        implementation: "xla", "pallas_tpu", or None: the kernel where there is one. It is for at
            most `MAX_QUERIES` queries, so that a long prompt goes by plain JAX.

    Returns:
        (B, T, H, d) in q's dtype. Gradients are those of plain JAX.

    Raises:
        UserError: shapes that do not fit; the implementation that was named cannot run.
    """
    if layer is None:
        k, v, layer = k[None], v[None], 0
    _check(q, k, v, window)
    args = (q, k, v, layer, first)
    options: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "soft_cap": soft_cap,
        "slopes": slopes,
    }
    implementations = {dispatch.XLA: functools.partial(xla.attend, *args, **options)}
    if q.shape[1] <= tpu.MAX_QUERIES or implementation is not None:
        implementations[dispatch.PALLAS_TPU] = functools.partial(tpu.attend, *args, **options)
    return dispatch.run("flash_decoding.attend", implementations, implementation)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> None:
    if window is not None and window < 1:
        raise UserError(f"window={window}: must be at least 1, the query's own key")
    _, num_queries, num_heads, width = q.shape
    length, num_kv_heads, key_width = k.shape[2:]
    if v.shape[2] != length:
        raise UserError(f"k, v: have {length} and {v.shape[2]} positions, must have as many")
    if length < num_queries:
        raise UserError(f"k: has {length} positions, must have the {num_queries} of q or more")
    if num_heads % num_kv_heads or v.shape[3] != num_kv_heads:
        raise UserError(
            f"k, v: have {num_kv_heads} and {v.shape[3]} heads, must have the same number, "
            f"which divides the {num_heads} of q"
        )
    if key_width != width:
        raise UserError(f"k: is {key_width} wide, must be as wide as q, {width}")
