"""Every kind of attention and every option, what their definition is, and small modules of them."""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.nn import Attention, Transformer, functional
from vqcx_jax.ops import attention as ops

KINDS: dict[str, schema.AttentionConfig] = {
    "complex": schema.ComplexAttention(),
    "published": schema.ComplexAttention(delta_init="published", scaled=False),
    "complex_learned": schema.ComplexAttention(frequencies="per_head", learned_frequencies=True),
    "complex_window_soft_cap": schema.ComplexAttention(window=3, logit_soft_cap=2.0),
    "smooth": schema.SmoothAttention(),
    "smooth_qk_norm": schema.SmoothAttention(qk_norm=True),
    "harmonic2": schema.HarmonicAttention(),
    "harmonic3_per_head": schema.HarmonicAttention(num_harmonics=3, frequencies="per_head"),
    "eulerformer": schema.EulerFormerAttention(),
    "eulerformer_planes_ntk": schema.EulerFormerAttention(
        share_planes=False, extension="ntk", extension_factor=4.0
    ),
    "amplitude_linear": schema.AmplitudeAttention(extension="linear", extension_factor=4.0),
    "rope": schema.RopeAttention(),
    "rope_0.75": schema.RopeAttention(rope_fraction=0.75),
    "rope_learned_yarn": schema.RopeAttention(
        learned_frequencies=True, extension="yarn", extension_factor=4.0, trained_length=64
    ),
    "pope": schema.PopeAttention(),
    "pope_0.75_per_head_learned_ntk": schema.PopeAttention(
        rope_fraction=0.75,
        frequencies="per_head",
        learned_frequencies=True,
        extension="ntk",
        extension_factor=4.0,
    ),
    "alibi": schema.AlibiAttention(),
    "alibi_window": schema.AlibiAttention(window=4),
    "nope": schema.NopeAttention(),
}

# What whole models are tested with, not what differs from another in parameters or frequencies.
WHOLE_MODELS = [
    name
    for name in KINDS
    if name
    not in {
        "published",
        "complex_learned",
        "smooth_qk_norm",
        "eulerformer_planes_ntk",
        "amplitude_linear",
        "rope_learned_yarn",
        "alibi",
    }
]

VOCAB_SIZE, DIM, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 30, 16, 4, 2, 8
# The second document of the first row stands first in the second row.
SEGMENTS = jnp.asarray([[1] * 4 + [2] * 5, [1] * 5 + [2] * 4])
POSITIONS = jnp.asarray([[*range(4), *range(5)], [*range(5), *range(4)]])
INPUTS = np.random.default_rng(1).standard_normal((2, 9, DIM), np.float32)


def make_layer(
    attention: schema.AttentionConfig,
    num_heads: int = NUM_HEADS,
    num_kv_heads: int = NUM_KV_HEADS,
    head_dim: int = HEAD_DIM,
    **options: Any,
) -> Attention:
    """At its start."""
    return Attention(
        DIM,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        attention=attention,
        rngs=nnx.Rngs(0),
        **options,
    )


@cache
def make_model(
    name: str, dtype: Literal["float32", "bfloat16"] = "float32", **options: Any
) -> Transformer:
    """Two layers with random parameters."""
    config = schema.Model(
        vocab_size=VOCAB_SIZE,
        embed_dim=DIM,
        num_layers=2,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        mlp_dim=24,
        attention=KINDS[name],
        head=schema.FullHead(),
        dtype=dtype,
    )
    return with_random_parameters(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))


def with_random_parameters(make: Callable[[], Any]) -> Any:
    """Numbers that bfloat16 has, too, so that two models of different dtypes are the same."""
    graphdef, params, buffers = functional.split(nnx.eval_shape(make))
    normal = np.random.default_rng(0).standard_normal
    params = jax.tree.map(
        lambda p: jnp.asarray(0.4 * normal(p.shape), jnp.bfloat16).astype(p.dtype), params
    )
    return nnx.merge(graphdef, params, buffers)


hidden = jax.jit(Transformer.hidden)
extend = jax.jit(Transformer.extend)


def literal_attention(
    options: schema.AttentionConfig,
    causal: bool,
    params: functional.Tree,
    x: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """(B, T, D): `literal_weights`, and the projections of an `Attention`."""
    weights = literal_weights(options, causal, params, x, segment_ids, positions)
    v = jnp.einsum("btd,dhk->bthk", x, params["v"])
    v = of_query_heads(v, weights.shape[1], axis=2)
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, params["out"])


def literal_weights(
    options: schema.AttentionConfig,
    causal: bool,
    params: functional.Tree,
    x: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """(B, H, T, T): the softmax over `literal_scores`."""
    scores = literal_scores(options, params, x, positions)
    num_heads, length = scores.shape[1:3]
    if options.logit_soft_cap is not None:
        scores = options.logit_soft_cap * jnp.tanh(scores / options.logit_soft_cap)
    index = jnp.arange(length)
    distance = index[:, None] - index
    if isinstance(options, schema.AlibiAttention):
        slopes = 2.0 ** (-8.0 * jnp.arange(1, num_heads + 1) / num_heads)
        scores -= slopes[:, None, None] * jnp.abs(distance)
    visible = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if causal:
        visible &= distance >= 0
    if options.window is not None:
        visible &= jnp.abs(distance) < options.window
    return jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)


def literal_scores(
    options: schema.AttentionConfig, params: functional.Tree, x: jax.Array, positions: jax.Array
) -> jax.Array:
    """(B, H, T, T), scaled, before soft-cap and ALiBi's penalty."""
    q, k = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in "qk")
    num_heads, head_dim = q.shape[2:]
    if options.qk_norm:
        rms_q, rms_k = (jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6) for y in (q, k))
        q, k = q / rms_q * params["q_gain"], k / rms_k * params["k_gain"]
    trained = params.get("encoding", {})
    scale = head_dim**-0.5

    def of_heads(name: str) -> jax.Array:
        one_for_all = isinstance(options, schema.EulerFormerAttention)
        return trained[name] if one_for_all else of_query_heads(trained[name], num_heads)

    if isinstance(options, schema.Rotary):
        width = 2 * head_dim if isinstance(options, schema.PopeAttention) else head_dim
        frequencies = literal_frequencies(options, k.shape[2], width)
        frequencies = frequencies * jnp.exp(trained.get("log_ratio", 0.0))
        match options.extension:
            case "linear":
                frequencies = ops.linear_frequencies(frequencies, 4.0)
            case "ntk":
                frequencies = ops.ntk_frequencies(frequencies, 4.0)
            case "yarn":
                frequencies = ops.yarn_frequencies(frequencies, 4.0, 64)
                scale *= (0.1 * np.log(4.0) + 1.0) ** 2
        where = of_query_heads(frequencies, num_heads), positions, positions
    k = of_query_heads(k, num_heads, axis=2)
    match options:
        case schema.ComplexAttention(scaled=scaled):
            scores = ops.complex_scores(q, k, of_heads("delta"), of_heads("bias"), *where)
            return scale * scores if scaled else scores
        case schema.EulerFormerAttention():
            return scale * ops.complex_scores(q, k, trained["delta"], trained["bias"], *where)
        case schema.AmplitudeAttention():
            bias = of_heads("bias")[:, None]
            return scale * ops.harmonic_scores(q, k, jnp.ones_like(bias), bias, *where)
        case schema.SmoothAttention():
            return scale * ops.smooth_scores(q, k, of_heads("a"), of_heads("bias"), *where)
        case schema.HarmonicAttention():
            return scale * ops.harmonic_scores(q, k, of_heads("weights"), of_heads("bias"), *where)
        case schema.RopeAttention():
            return scale * ops.rope_scores(q, k, *where)
        case schema.PopeAttention():
            bias = ops.clamp_bias(trained["bias"])
            return scale * ops.pope_scores(q, k, bias, *where)
    return scale * jnp.einsum("bthd,bshd->bhts", q, k)


def literal_frequencies(options: schema.Rotary, num_kv_heads: int, width: int) -> jax.Array:
    """(K, P), or (1, P) for all heads; P planes are half the width."""
    planes = jnp.arange(width // 2)
    between = jnp.zeros(1)
    if options.frequencies == "per_head":
        between = jnp.arange(num_kv_heads) / num_kv_heads
    omega = options.rope_base ** (-2 * (planes + between[:, None]) / width)
    return jnp.where(planes < int(options.rope_fraction * width) // 2, omega, 0.0)


def of_query_heads(x: jax.Array, num_heads: int, axis: int = 0) -> jax.Array:
    return jnp.repeat(x, num_heads // x.shape[axis], axis=axis)
