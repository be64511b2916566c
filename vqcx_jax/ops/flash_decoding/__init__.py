"""Attention of the last few tokens over a KV cache of encoded keys.

`api` chooses between `xla`, the formula in plain JAX, and `tpu`, a Pallas kernel that reads no more
of the cache than is filled.
"""

from vqcx_jax.ops.flash_decoding.api import attend
from vqcx_jax.ops.flash_decoding.tpu import MAX_QUERIES

__all__ = ["MAX_QUERIES", "attend"]
