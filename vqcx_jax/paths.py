"""Paths that users name."""

from pathlib import Path

from vqcx_jax.errors import UserError


def local_path(name: str, value: str) -> Path:
    """What a user calls `value`, with ~ expanded.

    Args:
        name: of the flag or field, for the message.

    Raises:
        UserError: a URL. As a path, gs://bucket would be a directory `gs:` beside the program, and
            what a run writes into it lost with the machine.
    """
    if "://" in value:
        raise UserError(
            f"{name}={value!r}: must be a path, not a URL; a bucket must be mounted as a directory"
        )
    return Path(value).expanduser()
