"""Paths that users name, and what they read where nothing can be written."""

import os
from pathlib import Path

import pytest

from vqcx_jax.errors import UserError
from vqcx_jax.paths import check_directory, local_path


def test_home() -> None:
    assert local_path("--workdir", "~/runs") == Path.home() / "runs"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "--workdir='': must be a path"),
        ("gs://bucket/run", "--workdir='gs://bucket/run': must be a path, not a URL"),
    ],
)
def test_no_paths(value: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        local_path("--workdir", value)


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "a/b"):
        check_directory("--workdir", path)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/a/b"):
        with pytest.raises(UserError, match=r"^--workdir='.*': must be a directory, '.*/file' is"):
            check_directory("--workdir", path, writable=False)
    monkeypatch.chdir(tmp_path)
    check_directory("--workdir", Path("run"))
    # Root, who may run tests, can write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    check_directory("cache_dir", tmp_path, writable=False)
    for path, writable in ((tmp_path, True), (tmp_path / "a", False)):
        with pytest.raises(UserError, match=r"must be a directory that can be written$"):
            check_directory("cache_dir", path, writable=writable)
