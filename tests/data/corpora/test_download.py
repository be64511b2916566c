import hashlib
import zipfile

import pytest

from vqcx_jax.data.corpora.download import Archive, fetch
from vqcx_jax.errors import DataError


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "served.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.mkdir("inner")
        file.writestr("inner/wiki.test.tokens", "a b")
    return Archive(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest())


def test_files_are_unpacked_once(tmp_path, archive):
    directory = fetch(archive, tmp_path / "downloads" / "x")
    assert (directory / "wiki.test.tokens").read_text() == "a b"
    (tmp_path / "served.zip").unlink()
    assert fetch(archive, directory) == directory
    assert [p.name for p in directory.parent.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "file:///no/such/file.zip"}, "cannot download .*--config.data.dataset.path=DIR"),
        ({"sha256": "0" * 64}, "has sha256 .* not 0000"),
    ],
)
def test_failure_leaves_nothing(tmp_path, archive, change, message):
    broken = Archive(**{"url": archive.url, "sha256": archive.sha256, **change})
    with pytest.raises(DataError, match=message):
        fetch(broken, tmp_path / "downloads" / "x")
    assert list((tmp_path / "downloads").iterdir()) == []
