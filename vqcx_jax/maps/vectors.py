"""Where one vector per token comes from: co-occurrence in the text, or a file."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import svds

from vqcx_jax.errors import DataError

# Tokens whose pairs are collected before they are added up.
_CHUNK_TOKENS = 2**20
# Context counts to this power make rare contexts count less (Levy, Goldberg and Dagan 2015).
_SMOOTHING = 0.75


def cooccurrence_vectors(
    documents: Iterable[np.ndarray],
    vocab_size: int,
    dim: int,
    *,
    window: int = 4,
    num_contexts: int = 20_000,
) -> np.ndarray:
    """Rows of a truncated SVD of positive pointwise mutual information.

    A token is described by what stands up to `window` places before it and, in columns of their
    own, behind it; at distance k an occurrence counts 1/k. Rows are u * sqrt(s). Tokens that do
    not occur have the vector 0.

    Args:
        documents: int (n,) token ids each; contexts end where they do. All are kept in memory,
            and pairs of token and context besides: some 100 bytes a token of text.
        vocab_size: V.
        dim: D.
        window: how far contexts reach.
        num_contexts: only the most frequent so many tokens count as contexts. Bounds memory.

    Returns:
        float32 (V, D), the same on every call.

    Raises:
        DataError: `dim` is not less than V and than twice the number of contexts.
    """
    documents = list(documents)
    counts = sum(
        (np.bincount(document, minlength=vocab_size) for document in documents),
        start=np.zeros(vocab_size, np.int64),
    )
    contexts = np.argsort(-counts, kind="stable")[:num_contexts]
    most = min(vocab_size, 2 * len(contexts)) - 1
    if dim > most:
        raise DataError(f"dim={dim}: must be at most {most} for {vocab_size} tokens as contexts")
    pairs = _count_pairs(documents, contexts, vocab_size, window)
    u, s, _ = svds(_ppmi(pairs), k=dim, rng=np.random.default_rng(0))
    return np.ascontiguousarray(u[:, ::-1] * np.sqrt(s[::-1]), np.float32)


def load_vectors(path: Path, vocab_size: int) -> np.ndarray:
    """Reads an .npy file of one row per token: float32 (V, D).

    Raises:
        DataError: not such a file, another number of rows, rows of no width, or values that are not
            finite as float32.
    """
    try:
        with path.open("rb") as file:
            vectors = np.lib.format.read_array(file)
    except FileNotFoundError:
        raise DataError(f"vectors={str(path)!r}: no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(f"vectors={str(path)!r}: not a readable .npy file") from error
    if vectors.dtype.kind not in "fiu":
        raise DataError(f"vectors={str(path)!r} has dtype {vectors.dtype}: expected numbers")
    if vectors.ndim != 2 or vectors.shape[0] != vocab_size or vectors.shape[1] == 0:
        raise DataError(
            f"vectors={str(path)!r} has shape {vectors.shape}: "
            f"expected one row a token, ({vocab_size}, D)"
        )
    with np.errstate(over="ignore"):
        vectors = vectors.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise DataError(f"vectors={str(path)!r}: must be finite as float32")
    return vectors


def _count_pairs(
    documents: list[np.ndarray], contexts: np.ndarray, vocab_size: int, window: int
) -> scipy.sparse.csr_array:
    """Weighted pairs of token and context, (V, 2C): contexts before, then contexts behind."""
    # Not int64, which the indices of the sum would then be too.
    columns = np.full(vocab_size, -1, np.int32)
    columns[contexts] = np.arange(len(contexts))
    shape = vocab_size, 2 * len(contexts)
    total = scipy.sparse.csr_array(shape, dtype=np.float32)
    for ids, document in _chunked(documents):
        for distance in range(1, min(window, len(ids) - 1) + 1):
            inside = document[:-distance] == document[distance:]
            first, second = ids[:-distance][inside], ids[distance:][inside]
            before, behind = columns[first], columns[second]
            rows = np.concatenate([second[before >= 0], first[behind >= 0]])
            places = np.concatenate([before[before >= 0], behind[behind >= 0] + len(contexts)])
            weights = np.full(len(rows), 1 / distance, np.float32)
            total += scipy.sparse.coo_array((weights, (rows, places)), shape).tocsr()
    return total


def _chunked(documents: list[np.ndarray]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Some documents at a time: their tokens, and the number of each token's document."""
    first, size = 0, 0
    for last, document in enumerate(documents, start=1):
        size += len(document)
        if size < _CHUNK_TOKENS and last < len(documents):
            continue
        chunk = documents[first:last]
        numbers = np.repeat(np.arange(len(chunk)), [len(document) for document in chunk])
        yield np.concatenate(chunk).astype(np.int32, copy=False), numbers
        first, size = last, 0


def _ppmi(pairs: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    pairs = pairs.tocoo()
    total = pairs.sum(dtype=np.float64)
    of_token = np.asarray(pairs.sum(axis=1, dtype=np.float64))
    of_context = np.asarray(pairs.sum(axis=0, dtype=np.float64)) ** _SMOOTHING
    of_context *= total / np.sum(of_context)
    expected = of_token[pairs.row] * of_context[pairs.col]
    information = np.log(pairs.data * total / expected).astype(np.float32)
    positive = information > 0
    return scipy.sparse.coo_array(
        (information[positive], (pairs.row[positive], pairs.col[positive])), pairs.shape
    ).tocsr()
