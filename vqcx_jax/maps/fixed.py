"""Token maps that need no vectors: at random, by token id, by frequency."""

import numpy as np


def random_map(vocab_size: int, num_codes: int, seed: int, num_codebooks: int = 1) -> np.ndarray:
    """Codes at random, every code and every tuple of codes used equally often (within one).

    With at least as many tuples as tokens, K^M >= V, no two tokens so share all their codes.

    Returns:
        int32 (V, M), columns in [0, K).
    """
    rng = np.random.default_rng(seed)
    # Blocks of K tokens have each code once in every codebook. Two tokens at the same place of
    # two blocks have the same first code and differ in the others by the shifts of their blocks.
    block, place = np.divmod(np.arange(vocab_size), num_codes)
    shifts = _distinct_shifts(block[-1] + 1, num_codes, num_codebooks - 1, rng)
    codes = np.empty((vocab_size, num_codebooks), np.int32)
    codes[:, 0] = place
    codes[:, 1:] = (place[:, None] + shifts[block]) % num_codes
    return rng.permutation(codes)


def contiguous_map(vocab_size: int, num_codes: int) -> np.ndarray:
    """Consecutive token ids share a code; sizes differ by at most one. int32 (V, 1)."""
    codes = np.arange(vocab_size, dtype=np.int64) * num_codes // vocab_size
    return codes.astype(np.int32)[:, None]


def frequency_map(counts: np.ndarray, num_codes: int) -> np.ndarray:
    """Tokens in order of falling frequency, cut into K runs of about equal frequency mass.

    The most frequent tokens so get a code of their own and rare ones share: runs of equal mass
    keep E[log n_code], the loss that ties cost when tokens have no bias, low.

    Args:
        counts: (V,) occurrences; unseen tokens count as one.

    Returns:
        int32 (V, 1); every code has at least one token (K <= V).
    """
    order = by_frequency(counts)
    mass = np.maximum(counts[order], 1).astype(np.float64)
    ends = np.cumsum(mass)
    starts, start, done = [], 0, 0.0
    for code in range(num_codes):
        starts.append(start)
        codes_left = num_codes - code
        target = done + (ends[-1] - done) / codes_left
        stop = int(np.searchsorted(ends, target * (1 - 1e-12))) + 1
        start = min(max(stop, start + 1), len(counts) - (codes_left - 1))
        done = ends[start - 1]
    sizes = np.diff([*starts, len(counts)])
    codes = np.empty((len(counts), 1), np.int32)
    codes[order, 0] = np.repeat(np.arange(num_codes, dtype=np.int32), sizes)
    return codes


def by_frequency(counts: np.ndarray) -> np.ndarray:
    """Token ids from the most to the least frequent; of equals, the lower id first."""
    return np.argsort(-counts.astype(np.int64), kind="stable")  # Unsigned zeros would come first.


def _distinct_shifts(
    rows: int, num_codes: int, columns: int, rng: np.random.Generator
) -> np.ndarray:
    """Random rows in [0, K): distinct while there are K^columns, all equally often beyond."""
    # As few columns as suffice are drawn without replacement, so that few rows are enumerated.
    enumerated = 0
    while enumerated < columns and num_codes**enumerated < rows:
        enumerated += 1
    total = num_codes**enumerated
    drawn = np.concatenate([rng.permutation(total) for _ in range(-(-rows // total))])[:rows]
    digits = drawn[:, None] // num_codes ** np.arange(enumerated) % num_codes
    free = rng.integers(num_codes, size=(rows, columns - enumerated))
    return np.concatenate([digits, free], axis=1)
