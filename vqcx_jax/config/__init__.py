"""Configuration of a run: the schema, files, command-line overrides and checks."""

from vqcx_jax.config import schema
from vqcx_jax.config.loading import load_config
from vqcx_jax.config.mesh import resolve_mesh_shape
from vqcx_jax.config.overrides import apply_overrides
from vqcx_jax.config.schema import Config
from vqcx_jax.config.serialization import from_json, to_json
from vqcx_jax.config.validation import check_attention, check_vocab_size, validate

__all__ = [
    "Config",
    "apply_overrides",
    "check_attention",
    "check_vocab_size",
    "from_json",
    "load_config",
    "resolve_mesh_shape",
    "schema",
    "to_json",
    "validate",
]
