"""Numerics as users compile them, with the newest jax; with the oldest, in half the time."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def as_users_compile(request: pytest.FixtureRequest) -> None:
    if jax.__version_info__ >= (0, 11):
        request.getfixturevalue("fully_optimized")
