"""Configuration files: what they return, and one line for everything that goes wrong in them."""

from pathlib import Path

import pytest

from vqcx_jax.config import Config, load_config, schema
from vqcx_jax.errors import ConfigError

HEAD = "from vqcx_jax.config import schema\n"


def write(directory: Path, text: str, name: str = "mine.py") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def test_returns_the_config(tmp_path: Path) -> None:
    text = (
        "STEPS = 7\ndef get_config():\n  return schema.Config(train=schema.Training(steps=STEPS))"
    )
    path = write(tmp_path, HEAD + text)
    assert load_config(path) == Config(train=schema.Training(steps=7))
    assert load_config(str(path)) == Config(train=schema.Training(steps=7))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]  # No byte code left behind.


def test_a_file_that_was_changed_is_read_again(tmp_path: Path) -> None:
    text = HEAD + "def get_config(): return schema.Config(train=schema.Training(steps={}))"
    for steps in (1, 2):
        path = write(tmp_path, text.format(steps))
        assert load_config(path).train.steps == steps


def test_a_file_can_start_from_another(tmp_path: Path) -> None:
    write(tmp_path, HEAD + "def get_config(): return schema.Config()", "base.py")
    text = """
import dataclasses
from pathlib import Path
from vqcx_jax.config import load_config
def get_config():
    base = load_config(Path(__file__).with_name("base.py"))
    return dataclasses.replace(base, train=dataclasses.replace(base.train, steps=9))
"""
    assert load_config(write(tmp_path, text)).train.steps == 9


def message_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "", "quickstart.py")
    write(tmp_path, "", "c4.py")
    message = message_of(tmp_path / "quikstart.py")
    assert message == (
        f"{tmp_path}/quikstart.py: no such configuration file (did you mean quickstart.py?); "
        f"{tmp_path} has c4.py, quickstart.py"
    )
    assert "no such configuration file" in message_of(tmp_path / "nowhere" / "c4.py")
    assert "no such configuration file" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", ": must define get_config()"),
        ("get_config = 3", ": TypeError: 'int' object is not callable"),
        ("def get_config(): return {}", ": get_config() returned {}; must return a Config"),
        ("def get_config(): return schema.Model()", ": get_config() returned Model("),
        ("x = (", ":2: SyntaxError: "),
        ("import no_such_module_x", ":2: ModuleNotFoundError: No module named 'no_such_module_x'"),
        ("def get_config():\n  return {}['key']", ":3: KeyError: 'key'"),
        ("def get_config(): raise RuntimeError('a\\nb')", ":2: RuntimeError: a b"),
        (
            "def get_config():\n  return schema.Model(num_layers=0)",
            ":3: model.num_layers=0: must be greater than or equal to 1",
        ),
        (
            "def get_config(): return schema.VQHead(num_code=3)",
            ":2: model.head.num_code: no such field (did you mean model.head.num_codes?)",
        ),
        (
            "def get_config(): return schema.Model(head='full')",
            ":2: model.head='full': must be a VQHead",
        ),
        (
            "def get_config(): return schema.Model(head=schema.BytesTokenizer())",
            ":2: model.head.kind='bytes': must be one of 'vq', ",
        ),
        (
            "def get_config(): return schema.Config(model=schema.VQHead())",
            ":2: model=VQHead(kind='vq', num_codes=512",
        ),
        ("schema.Model(3)", ":2: model=3: "),
        (
            "import pydantic\npydantic.TypeAdapter(list[int]).validate_python(3)",
            ":3: list[int]: Input should be a valid list",
        ),
        (
            "from vqcx_jax.config import *\n"
            "def get_config(): return apply_overrides(Config(), [('train.steps', 'x')])",
            ":3: train.steps='x': must be a valid integer",
        ),
    ],
)
def test_messages(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, HEAD + text)
    assert message_of(path).startswith(f"{path}{expected}")


def test_the_original_error_is_kept_for_debuggers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "1 / 0"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
