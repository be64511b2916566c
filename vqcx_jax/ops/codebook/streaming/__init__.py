"""Log Z and the best tokens of any number of codebooks, without an array of V columns.

`api` chooses between `xla`, which runs anywhere, and `tpu`, a Pallas kernel; `reference` is the
formula. (For the best tokens plain JAX makes V logits, of a few positions at a time.)
"""

from vqcx_jax.ops.codebook.streaming.api import log_z, top_k

__all__ = ["log_z", "top_k"]
