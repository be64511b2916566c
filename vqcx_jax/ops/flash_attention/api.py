"""Attention over raw queries and keys, by the implementation that suits the device."""

import functools
from typing import Any

import jax

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.flash_attention import tpu, xla
from vqcx_jax.ops.flash_attention.amplitude import Amplitude


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    frequencies: jax.Array,
    delta: jax.Array | None,
    bias: jax.Array | None,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    scale: float,
    amplitude: Amplitude | None = None,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(cap(scale q' k'^T)) v of one of `encode`'s forms.

    That is `encode.complex_queries_and_keys`, or RoPE without delta and bias; with an amplitude,
    `encode.amplitude_queries_and_keys` ("modulus") or `encode.pope_queries_and_keys` ("softplus").

    Args:
        q: (B, T, H, d), raw.
        k: (B, T, K, d), raw, with H a multiple of K; query head h reads key head h // (H / K).
        v: (B, T, K, dv).
        frequencies: float32 (P,) or (K, P), P = d/2, for "softplus" P = d; radians per position.
        delta: (K, P) or (P,), the slope of Adapt; None: 1, as in RoPE.
        bias: (H, P) or (P,), radians; None: 0.
        positions: int32 (B, T), of queries and keys, any integers.
        segment_ids: int32 (B, T), as in `segment_mask`; None: one document.
        scale: of the scores, before the soft-cap.
        amplitude: None, or what of queries and keys counts instead of their complex numbers.
        causal: as `causal_mask`. window: as `window_mask`. soft_cap: as in `core.attend`.
        implementation: "xla", "pallas_tpu", or None: the kernel where there is one.

    Returns:
        (B, T, H, dv) in q's dtype.

    Raises:
        UserError: shapes that do not fit; an amplitude with a delta; the implementation that was
            named cannot run.
    """
    options: dict[str, Any] = {
        "frequencies": frequencies,
        "delta": delta,
        "bias": bias,
        "positions": positions,
        "segment_ids": segment_ids,
        "scale": scale,
        "amplitude": amplitude,
        "causal": causal,
        "window": window,
        "soft_cap": soft_cap,
    }
    implementations = {
        dispatch.XLA: functools.partial(xla.attend, q, k, v, **options),
        dispatch.PALLAS_TPU: functools.partial(tpu.attend, q, k, v, **options),
    }
    return dispatch.run("flash_attention.attend", implementations, implementation)
