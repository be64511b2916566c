"""The trainer."""

from vqcx_jax.training.loop import TrainResult, train

__all__ = ["TrainResult", "train"]
