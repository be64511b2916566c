"""Eight CPU devices for every test, and float64 references to compare with."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Another platform is for tests/gpu. So many devices, so that one process can hold any small mesh.
jax.config.update("jax_platforms", os.environ.get("VQCX_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
# Compiles in half the time. What is tested as users compile it says so: `fully_optimized`.
jax.config.update("jax_disable_most_optimizations", True)
if jax.__version_info__ < (0, 11):
    # In a third of that time; the newest jax does not have the first one, nor gains by the second.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_cpu_use_fusion_emitters=false"
        + " --xla_cpu_parallel_codegen_split_count=1"
    )


# What two tests, or two of pytest's processes, compile alike is compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory()  # Until this process ends.
    os.environ["VQCX_TEST_COMPILED"] = _COMPILED.name
jax.config.update("jax_compilation_cache_dir", os.environ["VQCX_TEST_COMPILED"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


@pytest.fixture(scope="module", autouse=True)
def _few_programs() -> Iterator[None]:
    """A process that holds the programs of half of all tests gets no more memory maps (65,530)."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 30_000:
        jax.clear_caches()
        gc.collect()


@contextmanager
def _optimizations(disabled: bool) -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", disabled)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def fully_optimized() -> Iterator[None]:
    """Compiles as users do."""
    with _optimizations(disabled=False):
        yield


# Files that take long, the longest first: the last of them would keep one process busy alone.
_LONG = (
    "test_scripts.py",
    "test_reassignment.py",
    "test_flash_attention_tpu.py",
    "test_sharding.py",
    "test_attention_sharding.py",
    "test_heads.py",
    "test_loop.py",
    "test_tpu_compiles.py",
    "test_encode.py",
    "test_sampling.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a file the order stays."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else 99)


def _widen(x: Any) -> np.ndarray:
    is_float = jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
    return np.asarray(x, np.float64 if is_float else None)


@pytest.fixture(scope="session")
def in_float64() -> Callable[..., Any]:
    """in_float64(function, *args): function of args as float64, compiled; a tree of numpy arrays.

    Widening is exact, so that what differs is the arithmetic and never the input.
    """

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with jax.enable_x64(True), _optimizations(disabled=True):
            return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(_widen, args)))

    return run


@pytest.fixture(scope="session")
def max_error() -> Callable[[Any, np.ndarray], float]:
    """max_error(actual, expected): the largest |actual - expected|, over the largest |expected|."""

    def measure(actual: Any, expected: np.ndarray) -> float:
        difference = np.abs(np.asarray(actual, np.float64) - expected)
        return float(np.max(difference) / np.max(np.abs(expected)))

    return measure


@pytest.fixture(scope="session")
def assert_as_good_as(max_error: Any) -> Callable[[Any, Any, Any], None]:
    """assert_as_good_as(plain, actual, true): no leaf has more than twice the plain one's error."""

    def check(plain: Any, actual: Any, true: Any) -> None:
        leaves = (jax.tree.leaves(x) for x in (plain, actual, true))
        for of_plain, of_actual, of_true in zip(*leaves, strict=True):
            limit = 1e-5 + 2 * max_error(of_plain, of_true)
            assert max_error(of_actual, of_true) <= limit

    return check
