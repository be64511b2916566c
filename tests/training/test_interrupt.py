"""Stopping on a signal, in one process and in several."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import records, tiny_config

from vqcx_jax import checkpoint
from vqcx_jax.config import to_json
from vqcx_jax.training.interrupt import StopSignal


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def number(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def outside(number: int) -> Iterator[list[int]]:
    """The signals that a handler outside has seen."""
    seen: list[int] = []
    previous = signal.signal(number, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(number, previous)


def test_first_signal_is_a_request_and_the_second_acts_as_usual(
    number: int, outside: list[int]
) -> None:
    with StopSignal() as stop:
        assert stop.received(1) is None
        os.kill(os.getpid(), number)
        assert stop.received(2) == number
        assert outside == []
        os.kill(os.getpid(), number)
        assert outside == [number]
        assert stop.received(3) == number


def test_handlers_are_put_back(number: int, outside: list[int]) -> None:
    before = signal.getsignal(number)
    with StopSignal():
        assert signal.getsignal(number) != before
    assert signal.getsignal(number) == before
    os.kill(os.getpid(), number)
    assert outside == [number]


CONFIG = """
from vqcx_jax.config import from_json

def get_config():
    return from_json({fields!r})
"""


def test_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    """Two real ones of `train.py --distributed=true`. A signal to one of them stops all."""
    config = tiny_config(tmp_path, train__steps="100000", train__checkpoint_every="100000")
    (tmp_path / "config.py").write_text(CONFIG.format(fields=to_json(config)))
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(root / "train.py"),
                "--config=config.py",
                "--workdir=run",
                "--distributed=true",
                f"--coordinator={address}",
                "--num_processes=2",
                f"--process_id={index}",
            ],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(root),
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    stopped_by_signal = 128 + signal.SIGTERM
    assert [process.returncode for process in processes] == [stopped_by_signal] * 2, outputs
    stopped = [re.search(r"^step (\d+), checkpoint", output[0], re.MULTILINE) for output in outputs]
    assert stopped[0] and stopped[1] is None  # The first one prints for both.
    step = int(stopped[0][1])
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [step]
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, step + 1))
