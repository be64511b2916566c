"""`core.attend` within segments by cuDNN's flash attention, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from vqcx_jax.ops import dispatch
from vqcx_jax.ops.attention.core import segment_mask, window_mask


def attend_by_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v, never with T x T scores in memory.

    Args:
        q: (B, T, H, D). k: (B, T, K, D), with H a multiple of K, as in `core.attend`.
        v: (B, T, K, d), d at most D: cuDNN is given values as wide as keys, filled up with zeros.
        segment_ids: int (B, T), as in `segment_mask`, which makes a mask of B T T numbers. None: a
            row is one document, and no mask is needed.
        causal: as `causal_mask`. window: as `window_mask`.

    Returns:
        (B, T, H, d) in q's dtype.

    Raises:
        NotSupported: cuDNN cannot do it: float32, a soft-cap, values wider than keys, D above
            256 or no multiple of 8, a mask for an odd T; or there is no cuDNN.
    """
    if soft_cap is not None:
        raise dispatch.NotSupported(f"soft_cap={soft_cap}: cuDNN has none")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise dispatch.NotSupported(f"dtype={q.dtype}: cuDNN has bfloat16 and float16")
    key_width, value_width = k.shape[-1], v.shape[-1]
    if value_width > key_width:
        raise dispatch.NotSupported(f"values: are {value_width} wide, and keys {key_width}")
    wide_v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, key_width - value_width)))
    mask = None if segment_ids is None else segment_mask(segment_ids, segment_ids)
    left = None
    if window is not None:
        if causal and mask is None:
            left = (window - 1, 0)
        else:
            shown = window_mask(q.shape[1], k.shape[1], window)
            mask = shown if mask is None else mask & shown
    try:
        out = jax.nn.dot_product_attention(
            q,
            k,
            wide_v,
            mask=mask,
            scale=scale,
            is_causal=causal,
            local_window_size=left,
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise dispatch.NotSupported(f"cuDNN: {error}") from error
    return out[..., :value_width]
