"""In which order tiles are tried."""

import math
from collections.abc import Iterable

Sizes = tuple[int, ...]  # Of a tile.


def nearest_first(candidates: Iterable[Sizes], today: Sizes) -> list[Sizes]:
    """Those first whose sizes are the fewest halvings and doublings away from today's."""

    def distance(sizes: Sizes) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(sizes, today, strict=True))

    return sorted(candidates, key=lambda sizes: (distance(sizes), sizes))
