"""The summed loss of two codebooks, whose cells are few enough for kernels to keep on chip.

`api` chooses between `xla`, which runs anywhere, and `tpu`, a Pallas kernel.
"""

from vqcx_jax.ops.codebook.pairs import tpu, xla
from vqcx_jax.ops.codebook.pairs.api import summed_nll

__all__ = ["summed_nll", "tpu", "xla"]
