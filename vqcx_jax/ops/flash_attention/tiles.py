"""The tiles of the score matrix that a mask shows, in the order in which kernels visit them.

A tile is `block_q` queries by `block_kv` keys. Which tiles are seen, and which of them need a mask,
follows from the shapes and the masks by index alone. So the list is made at trace time, the grid of
a kernel runs along it, and tiles that are all masked cost neither compute nor bandwidth.
"""

import dataclasses

import numpy as np

# Bits of `Plan.code`; above them stands the index of the tile's kind.
FIRST_OF_ROW, LAST_OF_ROW, NEW_KEY, LAST_OF_KEY = 1, 2, 4, 8
KIND_SHIFT = 4


@dataclasses.dataclass(frozen=True)
class Visible:
    """Key s is visible to query t if low <= t - s <= high (None: no bound) and s < num_keys."""

    low: int | None
    high: int | None
    num_keys: int

    def shows_any(self, least: int, most: int) -> bool:
        """Is any of the differences least .. most visible?"""
        return (self.low is None or most >= self.low) and (self.high is None or least <= self.high)

    def shows_all(self, least: int, most: int) -> bool:
        """Are all of the differences least .. most visible?"""
        return (self.low is None or least >= self.low) and (self.high is None or most <= self.high)


def visible(causal: bool, window: int | None, num_keys: int) -> Visible:
    """Of `causal_mask` and `window_mask`.

    Causal queries never see the keys that pad the end, as these stand after them.
    """
    high = None if window is None else window - 1
    if causal:
        return Visible(0, high, num_keys=2**31 - 1)
    return Visible(None if high is None else -high, high, num_keys)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is masked in a tile, from the place of its first key relative to its first query.

    offset: first key - first query; None if the differences hide nothing.
    limit: keys of the tile that exist; None if all do.
    """

    offset: int | None
    limit: int | None

    def hides(
        self, visible: Visible, first_query: int, num_queries: int, first_key: int, num_keys: int
    ) -> tuple[bool, bool]:
        """Of a rectangle within the tile: is some of it hidden, is all of it?"""
        some = every = False
        if self.limit is not None:
            some, every = first_key + num_keys > self.limit, first_key >= self.limit
        if self.offset is not None:
            least = first_query - (first_key + num_keys - 1) - self.offset
            most = first_query + num_queries - 1 - first_key - self.offset
            some = some or not visible.shows_all(least, most)
            every = every or not visible.shows_any(least, most)
        return some, every


@dataclasses.dataclass(frozen=True)
class Plan:
    """Tiles in order, row by row (a row: the tiles of one query block), int32 (steps,) each.

    q_block, k_block: the tile. code: bits above and the index in `kinds`.
    first_fetch, last_fetch, both_fetch: the key block to hold in memory so that it is there at its
    first visit, its last, or both, and moved no more often.
    """

    q_block: np.ndarray
    k_block: np.ndarray
    first_fetch: np.ndarray
    last_fetch: np.ndarray
    both_fetch: np.ndarray
    code: np.ndarray
    kinds: tuple[Kind, ...]

    @property
    def num_steps(self) -> int:
        """Tiles."""
        return len(self.code)


def make_plan(
    visible: Visible,
    num_queries: int,
    block_q: int,
    block_kv: int,
    key_blocks: range,
) -> Plan:
    """The plan for all query blocks and a range of key blocks, numbered from its start.

    Every query block gets a tile, if need be one in which all is masked.
    """
    rows, columns, kinds_of = [], [], []
    for i in range(num_queries // block_q):
        found = False
        for j in key_blocks:
            first_query, first_key = i * block_q, j * block_kv
            least = first_query - (first_key + block_kv - 1)
            most = first_query + block_q - 1 - first_key
            if not visible.shows_any(least, most) or first_key >= visible.num_keys:
                continue
            found = True
            rows.append(i)
            columns.append(j)
            kinds_of.append(_kind(visible, first_query, first_key, block_q, block_kv))
        if not found:
            j = key_blocks[0]
            rows.append(i)
            columns.append(j)
            kinds_of.append(_kind(visible, i * block_q, j * block_kv, block_q, block_kv))
    kinds = tuple(dict.fromkeys(kinds_of))
    row, column = np.array(rows, np.int32), np.array(columns, np.int32) - key_blocks.start
    code = np.array([kinds.index(kind) << KIND_SHIFT for kind in kinds_of], np.int32)
    changes = row[1:] != row[:-1]
    code[np.append(True, changes)] |= FIRST_OF_ROW
    code[np.append(changes, True)] |= LAST_OF_ROW
    first_visit = _first_occurrences(column)
    last_visit = _first_occurrences(column[::-1])[::-1]
    code[first_visit] |= NEW_KEY
    code[last_visit] |= LAST_OF_KEY
    return Plan(
        row,
        column,
        _upcoming(column, first_visit),
        _upcoming(column, last_visit),
        _upcoming(column, first_visit | last_visit),
        code,
        kinds,
    )


def _kind(visible: Visible, first_query: int, first_key: int, block_q: int, block_kv: int) -> Kind:
    least = first_query - (first_key + block_kv - 1)
    most = first_query + block_q - 1 - first_key
    left = visible.num_keys - first_key
    return Kind(
        None if visible.shows_all(least, most) else first_key - first_query,
        left if left < block_kv else None,
    )


def _first_occurrences(values: np.ndarray) -> np.ndarray:
    is_first = np.zeros(len(values), bool)
    is_first[np.unique(values, return_index=True)[1]] = True
    return is_first


def _upcoming(values: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """The value at the next marked step, this one included; at the end the last one's."""
    out = values.copy()
    upcoming = values[np.flatnonzero(marked)[-1]]
    for step in range(len(values) - 1, -1, -1):
        if marked[step]:
            upcoming = values[step]
        out[step] = upcoming
    return out
