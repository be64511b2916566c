"""Configuration files: Python files with a function `get_config() -> Config`."""

import runpy
import traceback
from pathlib import Path

from pydantic import ValidationError

from vqcx_jax.config.messages import describe, did_you_mean, show
from vqcx_jax.config.schema import Config
from vqcx_jax.errors import ConfigError, UserError


def load_config(path: str | Path) -> Config:
    """Runs a configuration file and returns what its `get_config()` returns.

    A file can start from another one and change it:

      base = load_config(Path(__file__).with_name("quickstart.py"))
      return dataclasses.replace(base, ...)

    Raises:
      ConfigError: the file is missing, fails, or has no `get_config` that returns a `Config`.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(_missing(path))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise ConfigError("must define get_config()")
        config = get_config()
    except Exception as error:  # The file is the user's code, it may raise anything.
        raise ConfigError(f"{path}{_line(error, path)}: {_reason(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned {show(config)}; must return a Config")
    return config


def _missing(path: Path) -> str:
    names = tuple(sorted(file.name for file in path.parent.glob("*.py")))
    there = f"; {path.parent} has {', '.join(names)}" if names else ""
    return f"{path}: no such configuration file{did_you_mean(path.name, names)}{there}"


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ValidationError):
        return describe(error)
    return " ".join(f"{type(error).__name__}: {error}".split())


def _line(error: Exception, path: Path) -> str:
    """The line of the file at which the error left it, as ":12"; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f":{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""
