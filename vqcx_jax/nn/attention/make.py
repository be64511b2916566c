"""From a config to an encoding of positions."""

from flax import nnx

from vqcx_jax.config import schema
from vqcx_jax.nn.attention.alibi import AlibiEncoding
from vqcx_jax.nn.attention.base import Encoding
from vqcx_jax.nn.attention.phases import (
    AmplitudeEncoding,
    ComplexEncoding,
    EulerFormerEncoding,
    HarmonicEncoding,
    SmoothEncoding,
)
from vqcx_jax.nn.attention.pope import PopeEncoding
from vqcx_jax.nn.attention.rotary import RotaryEncoding


def make_encoding(
    attention: schema.AttentionConfig,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rules: schema.ShardingRules,
    rngs: nnx.Rngs,
) -> Encoding:
    """The encoding of positions that `attention` names."""
    heads = num_heads, num_kv_heads, head_dim, rules
    match attention:
        case schema.ComplexAttention():
            return ComplexEncoding(attention, *heads, rngs)
        case schema.SmoothAttention():
            return SmoothEncoding(attention, *heads)
        case schema.HarmonicAttention():
            return HarmonicEncoding(attention, *heads)
        case schema.AmplitudeAttention():
            return AmplitudeEncoding(attention, *heads)
        case schema.EulerFormerAttention():
            return EulerFormerEncoding(attention, num_kv_heads, head_dim, rules)
        case schema.RopeAttention():
            return RotaryEncoding(attention, num_kv_heads, head_dim, rules)
        case schema.PopeAttention():
            return PopeEncoding(attention, *heads)
        case schema.AlibiAttention():
            return AlibiEncoding(num_heads, head_dim, rules)
        case schema.NopeAttention():
            return Encoding(head_dim, rules)
