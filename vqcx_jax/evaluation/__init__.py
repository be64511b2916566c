"""Perplexity and text of trained models."""

from vqcx_jax.evaluation.perplexity import SplitLoss
from vqcx_jax.evaluation.trained import Perplexity, TrainedModel

__all__ = ["Perplexity", "SplitLoss", "TrainedModel"]
