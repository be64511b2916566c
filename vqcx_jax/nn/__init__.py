"""Thin NNX modules over `vqcx_jax.ops`.

They are plain pytrees, so jax.jit takes them as they are. jax.grad takes the trained arrays, which
`functional.split` separates from buffers (the integer token map of a VQ head among them).
"""

from vqcx_jax.nn.attention import Attention, KVCache
from vqcx_jax.nn.heads import (
    AdaptiveHead,
    ClassVQHead,
    FullHead,
    Head,
    HuffmanHead,
    LowRankHead,
    MultiVQHead,
    TwoLevelHead,
    VQHead,
    head_from_map,
)
from vqcx_jax.nn.layers import MLP, Embedding, RMSNorm
from vqcx_jax.nn.transformer import Transformer
from vqcx_jax.nn.variables import Buffer, Param

__all__ = [
    "MLP",
    "AdaptiveHead",
    "Attention",
    "Buffer",
    "ClassVQHead",
    "Embedding",
    "FullHead",
    "Head",
    "HuffmanHead",
    "KVCache",
    "LowRankHead",
    "MultiVQHead",
    "Param",
    "RMSNorm",
    "Transformer",
    "TwoLevelHead",
    "VQHead",
    "head_from_map",
]
