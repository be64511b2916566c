"""Ranks and Huffman trees: optimal, within the limit of length, and made in no time."""

import heapq
import math
import time

import numpy as np
import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.ops.hierarchical import frequency_rank, huffman_paths, path_length


def zipf(vocab_size: int, total: float = 1e6) -> np.ndarray:
    counts = (total / np.arange(1, vocab_size + 1)).astype(np.int64)
    return np.random.default_rng(0).permutation(counts)


def optimal_bits(counts: np.ndarray) -> int:
    """Total length of a Huffman code: every merge adds a bit to all that it merges."""
    heap, bits = [max(int(c), 1) for c in counts], 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        bits += merged
        heapq.heappush(heap, merged)
    return bits


def test_frequency_rank() -> None:
    counts = np.asarray([3, 0, 7, 3, 0], np.uint32)  # Unsigned, so that -0 is not the largest.
    np.testing.assert_array_equal(frequency_rank(counts), [1, 3, 0, 2, 4])
    assert frequency_rank(counts).dtype == np.int32


@pytest.mark.parametrize("vocab_size", [2, 3, 7, 100, 1009])
@pytest.mark.parametrize("kind", ["zipf", "equal", "unseen"])
def test_code_is_optimal_and_complete(vocab_size: int, kind: str) -> None:
    counts = {
        "zipf": zipf(vocab_size),
        "equal": np.full(vocab_size, 5),
        "unseen": np.zeros(vocab_size, np.int64),
    }[kind]
    paths = huffman_paths(counts)
    assert paths.shape == (vocab_size, path_length(vocab_size)) and paths.dtype == np.int32
    assert paths.min() >= 0 and paths.max() == 2 * vocab_size - 2
    lengths = (paths > 0).sum(axis=1)
    assert lengths @ np.maximum(counts, 1) == optimal_bits(counts)
    assert np.sum(0.5**lengths) == 1.0
    # Every step of every inner node is the last one of some path: the tree has no other edges.
    assert len({tuple(path) for path in paths}) == vocab_size
    assert set(paths[paths > 0]) == set(range(1, 2 * vocab_size - 1))


def test_long_paths_are_shortened() -> None:
    """Counts of powers of two have paths of V - 1 steps in Huffman's tree."""
    counts = 2 ** np.arange(40)
    paths = huffman_paths(counts)
    lengths = (paths > 0).sum(axis=1)
    assert lengths.max() <= path_length(40) == math.ceil(math.log2(40)) + 8
    assert np.sum(0.5**lengths) == 1.0
    assert np.all(np.diff(lengths) <= 0)
    assert lengths @ counts <= 1.01 * optimal_bits(counts)


def test_large_vocabulary_takes_seconds() -> None:
    start = time.perf_counter()
    paths = huffman_paths(zipf(131_072, 1e9))
    assert time.perf_counter() - start < 5  # 0.2 s on an idle machine.
    assert paths.shape == (131_072, 25)


def test_one_token_has_no_tree() -> None:
    with pytest.raises(UserError, match="counts of 1 tokens: a Huffman tree needs at least 2"):
        huffman_paths(np.ones(1))
