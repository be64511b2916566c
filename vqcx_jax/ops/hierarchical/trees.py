"""What hierarchies are made of before training, from token counts. Host-side numpy."""

import math

import numpy as np

from vqcx_jax.errors import UserError


def frequency_rank(counts: np.ndarray) -> np.ndarray:
    """Rank of each token by falling count, 0 the most frequent; of equals, the lowest id first.

    Args:
        counts: (V,).

    Returns:
        int32 (V,), a permutation of 0 .. V - 1.
    """
    rank = np.empty(len(counts), np.int32)
    rank[np.argsort(-counts.astype(np.int64), kind="stable")] = np.arange(len(counts))
    return rank


def path_length(vocab_size: int) -> int:
    """Steps of the longest path that `huffman_paths` makes, so that shapes depend on V alone.

    Eight more than a balanced tree needs: with this limit a code is longer than Huffman's by a few
    percent of a bit, and only where counts differ by more than 2^8.
    """
    return min(vocab_size - 1, math.ceil(math.log2(vocab_size)) + 8)


def huffman_paths(counts: np.ndarray) -> np.ndarray:
    """The way from every token to the root of a Huffman tree (Mikolov et al. 2013).

    Where a path is longer than `path_length` allows, counts are halved until none is (as in bzip2).

    Args:
        counts: int (V,) occurrences, V >= 2; unseen tokens count as one.

    Returns:
        int32 (V, path_length(V)), values in [0, 2 V - 1): 1 + 2 n + s for a step through inner node
        n in [0, V - 1), s = 0 for its first child and 1 for its second; 0 past the root.

    Raises:
        UserError: fewer than two tokens.
    """
    vocab_size = len(counts)
    if vocab_size < 2:
        raise UserError(f"counts of {vocab_size} tokens: a Huffman tree needs at least 2")
    weights = np.maximum(counts.astype(np.int64), 1)
    order = np.argsort(weights, kind="stable")
    weights, limit = weights[order], path_length(vocab_size)
    paths = _paths(*_merge(weights.tolist()))
    while paths.shape[1] > limit:
        weights = weights // 2 + 1
        paths = _paths(*_merge(weights.tolist()))
    padded = np.zeros((vocab_size, limit), np.int32)
    padded[order, : paths.shape[1]] = paths
    return padded


def _merge(weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Parent of every node but the root, and which child of it the node is.

    Leaves 0 .. V - 1 come by rising weight. Merged nodes, V and up, are then made by rising weight
    too, so that the two lightest are always at the head of one of two queues.
    """
    vocab_size = len(weights)
    weights = list(weights)
    parent = np.zeros(2 * vocab_size - 2, np.int64)
    side = np.zeros(2 * vocab_size - 2, np.int64)
    leaf, merged = 0, vocab_size
    for node in range(vocab_size, 2 * vocab_size - 1):
        total = 0
        for which in (0, 1):
            from_leaves = leaf < vocab_size and (merged == node or weights[leaf] <= weights[merged])
            child = leaf if from_leaves else merged
            leaf, merged = (leaf + 1, merged) if from_leaves else (leaf, merged + 1)
            parent[child], side[child] = node, which
            total += weights[child]
        weights.append(total)
    return parent, side


def _paths(parent: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Steps of all leaves, side by side: int (V, longest path)."""
    root = len(parent)
    vocab_size = root // 2 + 1
    node, columns = np.arange(vocab_size), []
    while np.any(node != root):
        below = np.minimum(node, root - 1)
        step = 1 + 2 * (parent[below] - vocab_size) + side[below]
        columns.append(np.where(node == root, 0, step))
        node = np.where(node == root, root, parent[below])
    return np.stack(columns, axis=1)
