"""Output layers that reach a token by a few decisions, each a small softmax or a sigmoid."""

from vqcx_jax.ops.hierarchical.trees import frequency_rank, huffman_paths, path_length
from vqcx_jax.ops.hierarchical.two_level import TwoLevelWeights, class_size

__all__ = ["TwoLevelWeights", "class_size", "frequency_rank", "huffman_paths", "path_length"]
