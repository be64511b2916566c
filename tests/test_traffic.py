"""The bytes that a kernel moves, as benchmarks/tpu_schedule.py counts them."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from versions import newest_jax

pytestmark = newest_jax


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    from schedules import traffic

    yield traffic
    for name in [name for name in sys.modules if name.split(".")[0] == "schedules"]:
        del sys.modules[name]


def kernel(table: Any, x: jax.Array) -> jax.Array:
    """Four steps: rows of x by a table, a block of y that is written in the second and the last."""
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2, 2),
        in_specs=[pl.BlockSpec((16, 128), lambda i, j, at: (at[2 * i + j], 0))],
        out_specs=pl.BlockSpec((16, 128), lambda i, j, at: (i, 0)),
    )
    return pl.pallas_call(
        lambda at, x, y: None,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32),
        name="moves",
    )(table, x)


def test_blocks_are_counted_when_their_index_changes(traffic: Any) -> None:
    block = 16 * 128 * 4
    x = jnp.zeros((64, 128))

    def moved(table: list[int]) -> Any:
        constant = np.asarray(table, np.int32)
        return traffic.of_kernels(jax.jit(lambda x: kernel(constant, x)).trace(x).jaxpr)

    assert moved([0, 1, 2, 3]) == {"moves": (4 + 2) * block}
    assert moved([0, 0, 0, 1]) == {"moves": (2 + 2) * block}
    assert moved([1, 0, 1, 1]) == {"moves": (3 + 2) * block}


def test_numbers_that_only_a_run_has(traffic: Any) -> None:
    traced = jax.jit(kernel).trace(jnp.zeros(4, jnp.int32), jnp.zeros((64, 128)))
    assert traffic.of_kernels(traced.jaxpr) == {"moves": None}


@pytest.mark.parametrize(
    ("shape", "whole", "dtype", "expected"),
    [
        ((16, 128), (64, 128), "bfloat16", 16 * 128 * 2),
        ((10, 100), (64, 100), "bfloat16", 16 * 128 * 2),  # Tiles of 16 x 128.
        ((10, 1), (64, 1), "float32", 16 * 128 * 4),  # Of 8 x 128.
        ((1, 300), (1, 300), "float32", 384 * 4),  # A single row is not filled up.
    ],
)
def test_padding(traffic: Any, shape: Any, whole: Any, dtype: str, expected: int) -> None:
    array = jax.ShapeDtypeStruct(whole, jnp.dtype(dtype))
    assert traffic._padded_bytes(shape, array) == expected
