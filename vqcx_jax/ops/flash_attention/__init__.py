"""Attention over raw queries and keys that are turned by their phases: complex (CMHA), RoPE, PoPE.

`api` chooses between `xla`, the formula in plain JAX, and `tpu`, Pallas kernels that turn queries
and keys themselves.
"""

from vqcx_jax.ops.flash_attention.api import attend

__all__ = ["attend"]
