"""Perplexity and text of trained models."""

from vqcx_jax.evaluation.perplexity import PositionLoss, SplitLoss
from vqcx_jax.evaluation.trained import OVERRIDABLE, Perplexity, TrainedModel

__all__ = ["OVERRIDABLE", "Perplexity", "PositionLoss", "SplitLoss", "TrainedModel"]
