"""Self-attention with exchangeable encodings of positions: one class for each `kind`."""

from vqcx_jax.nn.attention.base import Encoding, TokenInfo
from vqcx_jax.nn.attention.layer import Attention, KVCache
from vqcx_jax.nn.attention.make import make_encoding

__all__ = ["Attention", "Encoding", "KVCache", "TokenInfo", "make_encoding"]
