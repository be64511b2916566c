import pytest

from vqcx_jax.data.cache import cached_json


def test_value_is_built_once(tmp_path):
    path = tmp_path / "deep" / "a.json"
    assert cached_json(path, lambda: {"x": [1, "é"]}) == {"x": [1, "é"]}
    assert cached_json(path, lambda: pytest.fail("built again")) == {"x": [1, "é"]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"value": 1}', b"\xff"])
def test_damaged_file_is_rebuilt(tmp_path, damage):
    path = tmp_path / "a.json"
    path.write_bytes(damage)
    assert cached_json(path, lambda: 5) == 5
    assert cached_json(path, lambda: 6) == 5


def test_changed_value_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    cached_json(path, lambda: "right")
    path.write_text(path.read_text().replace("right", "wrong"))
    assert cached_json(path, lambda: "right") == "right"


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        cached_json(tmp_path / "a.json", lambda: object())
    assert list(tmp_path.iterdir()) == []
