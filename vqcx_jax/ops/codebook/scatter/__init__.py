"""V token logits from code logits, for when somebody asks for them.

`api` chooses between `xla`, which runs anywhere and is the formula, and `tpu`, a Pallas kernel.
"""

from vqcx_jax.ops.codebook.scatter.api import logits

__all__ = ["logits"]
