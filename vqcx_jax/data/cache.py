"""Results that are slow to make, kept in JSON files that are whole or absent."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqcx_jax.paths import check_directory, local_path


def cached_json(path: Path, build: Callable[[], Any]) -> Any:
    """Returns what `build` returned when `path` was made, making it if need be.

    A file that is damaged (its checksum does not fit) is made again. Processes that write the
    same file at once do no harm: each renames a complete file into place.
    """
    value = _read(path)
    if value is None:
        value = build()
        _write(path, value)
    return value


def content_key(value: Any) -> str:
    """Returns a short key for a JSON value, for use in a file name."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path) -> Any:
    try:
        stored = json.loads(path.read_bytes())
        return stored["value"] if stored["key"] == content_key(stored["value"]) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="incomplete.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"key": content_key(value), "value": value}, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def cache_directory(configured: str | None) -> Path:
    """Where prepared corpora and trained tokenizers are kept: `configured`, or the default.

    Raises:
        UserError: a URL, or what can be no directory.
    """
    path = local_path("cache_dir", configured or "~/.cache/vqcx_jax").absolute()
    check_directory("cache_dir", path, writable=False)
    return path
