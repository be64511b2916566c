"""The standard library of the running interpreter: real text that needs no network."""

import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from vqcx_jax.data.corpora.base import Document, Recipe, fingerprint, hash_fraction

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_HELD_OUT = 0.05


def recipe() -> Recipe:
    """Returns the .py files, split by a hash of the file name: 90% train, 5% each held out."""
    root = Path(sysconfig.get_path("stdlib"))
    files = _files(root)
    return Recipe(
        name="python_stdlib",
        fingerprint=fingerprint({"held_out": _HELD_OUT}, ((name, root / name) for name in files)),
        splits={
            split: partial(_documents, root, [name for name in files if _split(name) == split])
            for split in ("train", "validation", "test")
        },
    )


def _files(root: Path) -> list[str]:
    """Returns the sorted names of the UTF-8 source files, tests left out."""
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted(path.as_posix() for path in paths if _SKIPPED_FOLDERS.isdisjoint(path.parts))
    return [name for name in names if _is_utf8(root / name)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(name: str) -> str:
    fraction = hash_fraction(name)
    if fraction < _HELD_OUT:
        return "validation"
    return "test" if fraction < 2 * _HELD_OUT else "train"


def _documents(root: Path, names: list[str]) -> Iterator[Document]:
    for name in names:
        yield Document(text=(root / name).read_bytes().decode(), name=name)
