"""How heads that order tokens by frequency are told that order: in a `TokenMap`, as are codes."""

import numpy as np

from vqcx_jax.config import schema
from vqcx_jax.maps import TokenMap
from vqcx_jax.ops.hierarchical import frequency_rank, huffman_paths


def order_by_frequency(
    head: schema.AdaptiveHead | schema.HierarchicalHead, counts: np.ndarray
) -> TokenMap:
    """What `make_head` needs to know of a vocabulary.

    Args:
        counts: int (V,) occurrences in the training text.

    Returns:
        The rank of each token as its one code. For a Huffman tree, the steps of its path: first the
        inner nodes (0 past the root, n + 1 for node n), then which child is taken.
    """
    vocab_size = len(counts)
    if isinstance(head, schema.HierarchicalHead) and head.tree == "huffman":
        paths = huffman_paths(counts)
        length = paths.shape[1]
        codes = np.concatenate([(paths + 1) // 2, paths % 2], axis=1)
        return TokenMap(codes, (vocab_size,) * length + (2,) * length)
    return TokenMap(frequency_rank(counts)[:, None], (vocab_size,))


def ranks_of(token_map: TokenMap | None) -> np.ndarray | None:
    """The ranks in a map of `order_by_frequency`, int32 (V,)."""
    return None if token_map is None else token_map.codes[:, 0]


def paths_of(token_map: TokenMap) -> np.ndarray:
    """The paths in a map of `order_by_frequency`, as `ops.hierarchical.huffman_paths` made them."""
    nodes, is_first_child = np.split(token_map.codes, 2, axis=1)
    return 2 * nodes - is_first_child
