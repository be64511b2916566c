"""Configurations as JSON, for checkpoints and logs."""

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vqcx_jax.config.messages import describe
from vqcx_jax.config.schema import Config
from vqcx_jax.errors import ConfigError

_ADAPTER = TypeAdapter(Config)


def to_json(config: Config) -> dict[str, Any]:
    """Returns every field as JSON types: dicts, lists, strings, numbers, booleans and None."""
    return _ADAPTER.dump_python(config, mode="json")


def from_json(fields: dict[str, Any]) -> Config:
    """Inverse of `to_json`. Fields that are left out have their defaults.

    Raises:
      ConfigError: an unknown field, or a value that a field does not accept.
    """
    try:
        # Strict validation takes a list for a tuple only when it reads JSON text.
        return _ADAPTER.validate_json(json.dumps(fields))
    except ValidationError as error:
        raise ConfigError(describe(error)) from None
