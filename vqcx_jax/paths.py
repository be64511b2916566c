"""Paths that users name."""

import os
from pathlib import Path

from vqcx_jax.errors import UserError


def local_path(name: str, value: str) -> Path:
    """What a user calls `value`, with ~ expanded.

    Args:
        name: of the flag or field, for the message.

    Raises:
        UserError: nothing, or a URL. As a path, gs://bucket would be a directory `gs:` beside the
            program, and what a run writes into it lost with the machine.
    """
    if not value:
        raise UserError(f"{name}='': must be a path")
    if "://" in value:
        raise UserError(
            f"{name}={value!r}: must be a path, not a URL; a bucket must be mounted as a directory"
        )
    return Path(value).expanduser()


def check_directory(name: str, path: Path, *, writable: bool = True) -> None:
    """Raises UserError unless path is a directory that can be written, or can be made.

    Args:
        name: of the flag or field, for the message.
        writable: False: one that is there may be for reading alone.
    """
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{name}={str(path)!r}: must be a directory, {str(there)!r} is a file")
    if (writable or there != path) and not os.access(there, os.W_OK):
        raise UserError(f"{name}={str(path)!r}: must be a directory that can be written")
