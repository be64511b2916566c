"""The loss within classes of tokens: the second level of `classes`.

`api` chooses between `xla`, which runs anywhere and is the formula, and `tpu`, a Pallas kernel.
"""

from vqcx_jax.ops.codebook.members.api import nll

__all__ = ["nll"]
