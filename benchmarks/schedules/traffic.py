"""Bytes that a kernel moves between HBM and vector memory, from its blocks and their index maps.

Pallas fetches a block when its index is not that of the step before, and writes one back when its
index changes. What a kernel copies by itself is not counted.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax._src.state.discharge import discharge_state

_LANES, _SUBLANE_BYTES = 128, 32  # Of a tile, which the last two dimensions are padded to.
_SMALL = 2**16  # Elements of what is worth computing: the numbers that index maps read.


def of_kernels(traced: jex.ClosedJaxpr) -> dict[str, float | None]:
    """Bytes by name of the kernel; None: they depend on numbers that only a run has."""
    found: dict[str, float | None] = {}
    unknown = [None] * len(traced.jaxpr.invars)
    for name, blocks, scalars in _kernels(traced.jaxpr, traced.consts, unknown):
        moved = [_bytes(block, blocks.grid, scalars) for block in blocks.block_mappings]
        found[name] = None if None in moved else float(sum(x for x in moved if x is not None))
    return found


def _kernels(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]
) -> Iterator[tuple[str, Any, list[Any]]]:
    """Kernels with their scalars; values are followed where they are known and small."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def value(x: Any) -> Any:
        return x.val if isinstance(x, jex.Literal) else known.get(x)

    for equation in jaxpr.eqns:
        values = [value(x) for x in equation.invars]
        parameters = equation.params
        if equation.primitive.name == "pallas_call":
            blocks = parameters["grid_mapping"]
            scalars = values[: blocks.num_index_operands]
            yield parameters["name"], blocks, scalars
            continue
        inner = [x for x in parameters.values() if isinstance(x, jex.ClosedJaxpr)]
        for closed in inner:
            if len(closed.jaxpr.invars) == len(values):
                yield from _kernels(closed.jaxpr, closed.consts, values)
        is_small = all(math.prod(x.aval.shape) <= _SMALL for x in equation.outvars)
        if is_small and not any(x is None for x in values):
            known.update(zip(equation.outvars, _results(equation, values), strict=True))


def _results(equation: Any, values: Sequence[Any]) -> list[Any]:
    """Of an equation; one that is compiled would be so for a device that is not there."""
    if equation.primitive.name != "jit":
        results = equation.primitive.bind(*values, **equation.params)
        return list(results) if equation.primitive.multiple_results else [results]
    closed = equation.params["jaxpr"]
    known = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(closed.jaxpr.invars, values, strict=True))

    def value(x: Any) -> Any:
        return x.val if isinstance(x, jex.Literal) else known[x]

    for inner in closed.jaxpr.eqns:
        results = _results(inner, [value(x) for x in inner.invars])
        known.update(zip(inner.outvars, results, strict=True))
    return [value(x) for x in closed.jaxpr.outvars]


def _bytes(block: Any, grid: tuple[int, ...], scalars: list[Any]) -> float | None:
    shape = [getattr(size, "block_size", 1) for size in block.block_shape]
    array = block.array_aval
    if not hasattr(array, "dtype") or "smem" in str(block.transformed_block_aval):
        return 0.0
    index_map = block.index_map_jaxpr
    jaxpr = discharge_state(index_map)
    read = {x for e in jaxpr.eqns for x in e.invars if not isinstance(x, jex.Literal)}
    of_scalars = jaxpr.invars[len(grid) :]
    if any(x is None and of in read for of, x in zip(of_scalars, scalars, strict=True)):
        return None
    scalars = [
        np.zeros(of.aval.shape, of.aval.dtype) if x is None else x
        for of, x in zip(of_scalars, scalars, strict=True)
    ]

    def index(*step: jax.Array) -> list[jax.Array]:
        return jex.jaxpr_as_fun(jaxpr)(*step, *scalars)[: len(shape)]

    steps = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid)).astype(np.int32)
    indices = np.stack(jax.vmap(index)(*steps), axis=1)
    moves = 1 + np.count_nonzero(np.any(indices[1:] != indices[:-1], axis=1))
    return float(moves * _padded_bytes(shape, array))


def _padded_bytes(shape: Sequence[int], array: Any) -> int:
    """Of a block: rows are padded to lanes, and so is the number of rows, if there are several."""
    *leading, rows, columns = (1, 1, *shape)
    itemsize = np.dtype(array.dtype).itemsize
    columns = -(-columns // _LANES) * _LANES
    sublanes = _SUBLANE_BYTES // itemsize
    rows = rows if array.shape[-2:-1] in ((), (1,)) else -(-rows // sublanes) * sublanes
    return math.prod(leading) * rows * columns * itemsize
