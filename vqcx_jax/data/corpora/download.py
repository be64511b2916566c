"""Downloads a zip archive of known contents, once."""

import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vqcx_jax.errors import DataError

_TIMEOUT_S = 60


@dataclass(frozen=True)
class Archive:
    """A zip file on the web."""

    url: str
    sha256: str


def fetch(archive: Archive, directory: Path) -> Path:
    """Unpacks the archive's files into `directory`, unless that exists, and returns it.

    Folders inside the archive are dropped. The directory appears complete or not at all.

    Raises:
        DataError: the archive cannot be downloaded, or is not the expected one.
    """
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix="incomplete.") as scratch:
        zipped = Path(scratch, "archive.zip")
        unpacked = Path(scratch, "files")
        _download(archive, zipped)
        unpacked.mkdir()
        with zipfile.ZipFile(zipped) as file:
            for member in file.infolist():
                if not member.is_dir():
                    with (
                        file.open(member) as data,
                        open(unpacked / Path(member.filename).name, "wb") as target,
                    ):
                        shutil.copyfileobj(data, target)
        try:
            os.rename(unpacked, directory)
        except OSError:
            # Another process may have been first.
            if not directory.exists():
                raise
    return directory


def _download(archive: Archive, path: Path) -> None:
    request = urllib.request.Request(archive.url, headers={"User-Agent": "vqcx_jax"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as data, path.open("wb") as file:
            shutil.copyfileobj(data, file)
    except OSError as error:
        raise DataError(
            f"cannot download {archive.url} ({error}); if you have the files, "
            "pass --config.data.dataset.path=DIR"
        ) from None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise DataError(
            f"{archive.url} has sha256 {found}, not {archive.sha256}; if you have the files, "
            "pass --config.data.dataset.path=DIR"
        )
