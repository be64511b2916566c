"""Flash attention over raw queries and keys on TPUs: complex (CMHA), rotary or PoPE, by Pallas.

After FlashAttention (Dao et al. 2022; Dao 2023): scores live in VMEM only, and the backward pass
makes them again. What is ours is that queries and keys come raw: kernels turn each block by its
phases when they first read it, and keep turned keys in VMEM, so that neither turned queries nor
turned keys, nor their gradients, exist in HBM. Where phases follow from positions alone, by
frequencies that all heads share, their cosines and sines are made before, once for all heads: in a
kernel they were a fifth of PoPE's forward pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from vqcx_jax.errors import UserError
from vqcx_jax.ops import device
from vqcx_jax.ops.attention import clamp_bias
from vqcx_jax.ops.dispatch import NotSupported
from vqcx_jax.ops.flash_attention.amplitude import Amplitude, check, num_planes
from vqcx_jax.ops.flash_attention.block_sizes import BlockSizes, fit
from vqcx_jax.ops.flash_attention.block_sizes import block_sizes as of_table
from vqcx_jax.ops.flash_attention.tiles import visible
from vqcx_jax.ops.flash_attention.tpu_backward import backward
from vqcx_jax.ops.flash_attention.tpu_common import Inputs, Settings
from vqcx_jax.ops.flash_attention.tpu_forward import forward
from vqcx_jax.ops.tpu import LANES
from vqcx_jax.ops.varying import varying_like


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
    block_sizes: BlockSizes | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See `api.attend`.

    q' and k' are rounded to the dtypes of q and k; phases, softmax and sums are float32. Gradients
    by q, k, v, frequencies, delta and bias are those of this composition.

    Args, beside those of `api.attend`:
        q, k, v: bfloat16 or float32; d and dv are multiples of 16.
        block_sizes: of the kernels; None: those of the table for this device.
        interpret: Pallas's TPU interpreter, for tests.

    Returns:
        (B, T, H, dv) in q's dtype.

    Raises:
        NotSupported: a width or dtype that the kernels cannot work with.
        UserError: shapes that do not fit; an amplitude with a delta.
    """
    _, length, num_heads, width = q.shape
    num_kv_heads = k.shape[2]
    _check(q, k, v, window)
    check(amplitude, delta)
    if amplitude == "softplus" and bias is not None:
        bias = clamp_bias(bias)
    planes_of_head = num_planes(width, amplitude)
    if block_sizes is None:
        head_dim, is_packed = max(width, v.shape[-1]), segment_ids is not None
        block_sizes = of_table(device.current().kind, head_dim, is_packed)
    blocks = fit(block_sizes, length)
    # PoPE's table in wider heads leaves too little vector memory at 32,768 float32 positions.
    is_shared = frequencies.ndim == 1 or len(frequencies) == 1
    settings = Settings(
        scale=float(scale),
        soft_cap=soft_cap,
        visible=visible(causal, window, length),
        blocks=blocks,
        amplitude=amplitude,
        has_table=delta is None and is_shared and width <= LANES,
        interpret=interpret,
    )
    step = max(blocks.block_q, blocks.block_kv, blocks.block_q_backward, blocks.block_kv_backward)
    padding = -length % step

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))), 1, 2)

    def row(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, padding)))[:, None].astype(jnp.int32)
        return varying_like(padded, q)

    def column(x: jax.Array, heads: int) -> jax.Array:
        planes = jnp.broadcast_to(x.astype(jnp.float32), (heads, planes_of_head))[..., None]
        return varying_like(planes, q)

    inputs = Inputs(
        by_head(q),
        by_head(k),
        by_head(v),
        row(positions),
        None if segment_ids is None else row(segment_ids),
        column(frequencies, num_kv_heads),
        None if delta is None else column(delta, num_kv_heads),
        None if bias is None else column(bias, num_heads),
    )
    return jnp.swapaxes(_attend(settings, inputs), 1, 2)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings: Settings, inputs: Inputs) -> jax.Array:
    return forward(inputs, settings)[0]


def _attend_forward(settings: Settings, inputs: Inputs) -> tuple[jax.Array, Any]:
    out, lse = forward(inputs, settings)
    return out, (inputs, out, lse)


def _attend_backward(settings: Settings, residuals: Any, d_out: jax.Array) -> tuple[Inputs]:
    inputs, out, lse = residuals
    gradients = backward(inputs, settings, out, lse, d_out)
    by_plane = {
        name: jnp.sum(gradients[name], axis=0)[..., None]
        for name in ("omega", "delta", "bias")
        if name in gradients
    }
    gradients_of_inputs = Inputs(
        q=gradients["q"],
        k=gradients["k"],
        v=gradients["v"],
        omega=by_plane["omega"],
        delta=by_plane.get("delta"),
        bias=by_plane.get("bias"),
        # Integers have none.
        positions=None,  # type: ignore[arg-type]
        segment_ids=None,
    )
    return (gradients_of_inputs,)


_attend.defvjp(_attend_forward, _attend_backward)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> None:
    if window is not None and window < 1:
        raise UserError(f"window={window}: must be at least 1, the query's own key")
    if k.shape[1] != q.shape[1] or v.shape[1] != q.shape[1]:
        raise UserError(
            f"k, v: have {k.shape[1]} and {v.shape[1]} positions, must have the {q.shape[1]} of q"
        )
    if q.shape[2] % k.shape[2] or v.shape[2] != k.shape[2]:
        raise UserError(
            f"k, v: have {k.shape[2]} and {v.shape[2]} heads, must have the same number, "
            f"which divides the {q.shape[2]} of q"
        )
    for name, x in (("q", q), ("v", v)):
        if x.shape[3] % 16:
            raise NotSupported(f"{name}: is {x.shape[3]} wide, must be a multiple of 16")
    if k.shape[3] != q.shape[3]:
        raise UserError(f"k: is {k.shape[3]} wide, must be as wide as q, {q.shape[3]}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in (jnp.bfloat16, jnp.float32):
            raise NotSupported(f"{name}: is {x.dtype}, must be bfloat16 or float32")
