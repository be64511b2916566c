"""Codes made unique: no two tokens share all of theirs."""

import numpy as np

from vqcx_jax.errors import DataError


def make_unique(
    codes: np.ndarray, vectors: np.ndarray, codebooks: tuple[np.ndarray, ...]
) -> np.ndarray:
    """Moves tokens whose codes an earlier token has to the nearest codes that are free.

    Only the last codebook's code changes where any is free with the others kept; else the last
    two, and so on.

    Args:
        codes: int32 (V, M). Of tokens with the same codes the first keeps them, so sort by what
            an error costs.
        vectors: float32 (V, D) that the codes stand for.
        codebooks: M arrays float32 (K, D) of one K, see `quantize.full_width`.

    Returns:
        int32 (V, M), rows distinct.

    Raises:
        DataError: there are more tokens than tuples of codes.
    """
    (num_tokens, num_codebooks), num_codes = codes.shape, len(codebooks[0])
    if num_codes**num_codebooks < num_tokens:
        raise DataError(
            f"num_codes={num_codes}, num_codebooks={num_codebooks}: make "
            f"{num_codes**num_codebooks} tuples, fewer than the {num_tokens} tokens that are to "
            "have one of their own"
        )
    tuples = [tuple(row) for row in codes.tolist()]
    cells = _Cells(num_codes, num_codebooks, num_tokens)
    movers = []
    for token, cell in enumerate(tuples):
        if cells.room(cell):
            cells.take(cell)
        else:
            movers.append(token)
    # ||rest - c||^2 without the norm of the rest, which all codes share.
    norms = [np.einsum("kd,kd->k", book, book) for book in codebooks]
    unique = codes.copy()
    for token in movers:
        kept = cells.longest_prefix_with_room(tuples[token])
        rest = vectors[token] - sum(codebooks[m][code] for m, code in enumerate(kept))
        for m in range(len(kept), num_codebooks):
            distances = norms[m] - 2 * codebooks[m] @ rest
            order = np.argsort(distances, kind="stable").tolist()
            code = next(code for code in order if cells.room((*kept, code)))
            kept = (*kept, code)
            rest = rest - codebooks[m][code]
        cells.take(kept)
        unique[token] = kept
    return unique


class _Cells:
    """How many tokens have codes that begin with some codes, where that can be all there is."""

    def __init__(self, num_codes: int, num_codebooks: int, num_tokens: int):
        # Tuples that begin with a prefix, by its length. More than there are tokens never run out.
        sizes = [num_codes ** (num_codebooks - length) for length in range(num_codebooks + 1)]
        self._sizes = sizes
        self._counted = [length for length, size in enumerate(sizes) if size <= num_tokens]
        self._taken: dict[tuple[int, ...], int] = {}

    def take(self, cell: tuple[int, ...]) -> None:
        for length in self._counted:
            prefix = cell[:length]
            self._taken[prefix] = self._taken.get(prefix, 0) + 1

    def room(self, prefix: tuple[int, ...]) -> bool:
        return self._taken.get(prefix, 0) < self._sizes[len(prefix)]

    def longest_prefix_with_room(self, cell: tuple[int, ...]) -> tuple[int, ...]:
        lengths = range(len(cell) - 1, -1, -1)
        return next(cell[:length] for length in lengths if self.room(cell[:length]))
