"""Compiled steps, timed side by side."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass
class Step:
    """The times of a call, which need not wait for the result that it returns.

    temporary: bytes that the program needs beside arguments and results, where it is known.
    """

    call: Callable[[], Any]
    temporary: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self, calls: int) -> float:
        """Seconds of so many calls."""
        start = time.perf_counter()
        for _ in range(calls):
            result = self.call()
        jax.block_until_ready(result)
        return time.perf_counter() - start


def compile_step(function: Callable[..., Any], *args: Any) -> Step:
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    return Step(lambda: compiled(*args), 0 if memory is None else memory.temp_size_in_bytes)


def number_that_fills(seconds: Callable[[int], float]) -> int:
    """The first power of two whose `seconds` are 0.2 or more, after a warm-up."""
    number = 1
    seconds(number)
    while seconds(number) < 0.2:
        number *= 2
    return number


def measure(rows: dict[str, Step], repeats: int) -> None:
    calls = {name: number_that_fills(row.run) for name, row in rows.items()}
    for _ in range(repeats):
        for name, row in rows.items():
            # Large results of the row before are freed on another thread, up to 50 ms later.
            time.sleep(0.1)
            row.seconds.append(row.run(calls[name]) / calls[name])


def print_ratios(title: str, rows: dict[str, Step], base: str) -> None:
    """Times and memory of rows, and as a multiple of those of the row `base`, side by side."""
    of_base = rows[base]
    print(f"\n| {title} | ms, median | time / {base}'s | MB | memory / {base}'s |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(row.seconds, of_base.seconds, strict=True)]
        spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f} - {max(ratios):.3f}]"
        print(
            f"| {name} | {1e3 * statistics.median(row.seconds):.3g} | {spread} "
            f"| {row.temporary / 1e6:.1f} | {row.temporary / of_base.temporary:.2f} |",
            flush=True,
        )
