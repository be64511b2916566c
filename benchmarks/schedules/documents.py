"""Rows of documents such as training packs, for what kernels make of them.

Lengths are log-normal: logarithms of mean 5.55 and deviation 1, as those of 1,000 documents of C4
have in tokens of a vocabulary of 128,000 (mean 432, median 255).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_NUM_DOCUMENTS = 8000


@functools.cache
def packed_rows(length: int) -> jax.Array:
    """Segment ids of rows, int32 (R, length): documents one after the other, cut where rows end."""
    normal = np.random.default_rng(0).normal(5.55, 1.0, _NUM_DOCUMENTS)
    lengths = np.maximum(2, np.exp(normal)).astype(int)
    ids = np.repeat(np.arange(_NUM_DOCUMENTS, dtype=np.int32), lengths)
    return jnp.asarray(ids[: len(ids) // length * length].reshape(-1, length))


def pairs(rows: jax.Array) -> float:
    """Pairs of a token and one of its document that is not after it, in a row on average."""
    sizes = [np.unique(row, return_counts=True)[1] for row in np.asarray(rows)]
    return float(np.mean([np.sum(n * (n + 1) / 2) for n in sizes]))
