"""Output layers behind one interface, `Head`."""

from vqcx_jax.nn.heads.adaptive import AdaptiveHead
from vqcx_jax.nn.heads.base import Head, Sampler
from vqcx_jax.nn.heads.class_vq import ClassVQHead
from vqcx_jax.nn.heads.frequency_order import order_by_frequency
from vqcx_jax.nn.heads.from_map import head_from_map
from vqcx_jax.nn.heads.full import FullHead
from vqcx_jax.nn.heads.huffman import HuffmanHead
from vqcx_jax.nn.heads.learned_vq import LearnedVQHead
from vqcx_jax.nn.heads.low_rank import LowRankHead
from vqcx_jax.nn.heads.make import make_head
from vqcx_jax.nn.heads.multi_vq import MultiVQHead
from vqcx_jax.nn.heads.reassigned_vq import ReassignedVQHead
from vqcx_jax.nn.heads.two_level import TwoLevelHead
from vqcx_jax.nn.heads.vq import VQHead

__all__ = [
    "AdaptiveHead",
    "ClassVQHead",
    "FullHead",
    "Head",
    "HuffmanHead",
    "LearnedVQHead",
    "LowRankHead",
    "MultiVQHead",
    "ReassignedVQHead",
    "Sampler",
    "TwoLevelHead",
    "VQHead",
    "head_from_map",
    "make_head",
    "order_by_frequency",
]
