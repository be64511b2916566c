"""Mistakes in connecting processes; two real ones that train are in test_interrupt.py."""

from typing import Any

import jax
import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.training import processes

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "one": (
        {"coordinator": "localhost:1"},
        "num_processes, process_id: must be given, too, or none of coordinator",
    ),
    "two": ({"num_processes": 2, "process_id": 0}, "coordinator: must be given, too"),
    "id": (
        {"coordinator": "localhost:1", "num_processes": 2, "process_id": 2},
        "process_id=2: must be below num_processes=2",
    ),
}


@pytest.mark.parametrize("arguments, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processes.connect(**arguments)


def test_there_is_no_cluster() -> None:
    """This process has used its devices, and knows no coordinator: JAX's reason in one line."""
    jax.devices()
    with pytest.raises(UserError, match=r"^distributed=true: .+$") as error:
        processes.connect()
    assert "\n" not in str(error.value)
