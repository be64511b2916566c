"""Output layers with a row of weights per token: the baselines of every other head."""

from vqcx_jax.ops.softmax.full import logits, nll
from vqcx_jax.ops.softmax.streamed import nll as streamed_nll
from vqcx_jax.ops.softmax.summed import summed_nll

__all__ = ["logits", "nll", "streamed_nll", "summed_nll"]
