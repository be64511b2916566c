"""Log Z of any number of codebooks, without an array of V columns.

`api` chooses between `xla`, which runs anywhere, and `tpu`, a Pallas kernel; `reference` is the
formula.
"""

from vqcx_jax.ops.codebook.streaming.api import log_z

__all__ = ["log_z"]
