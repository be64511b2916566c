"""Command-line overrides: `model.head.num_codes=256` applied to a configuration."""

from collections.abc import Sequence
from dataclasses import replace
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from vqcx_jax.config.fields import all_kinds, alternatives, annotations, kinds, sections
from vqcx_jax.config.messages import requirement, show, unknown_field
from vqcx_jax.config.schema import Config
from vqcx_jax.errors import ConfigError


def apply_overrides(config: Config, overrides: Sequence[tuple[str, str]]) -> Config:
    """Returns `config` with some fields replaced.

    Kinds are applied first, whatever their place in the sequence: a new kind keeps the fields
    that it shares (name and type) with the old one and that were not at their default there; all
    others have the new class's defaults.
    Of several overrides of one field the last one counts.

    Args:
      config: left as it is.
      overrides: pairs of a path such as "model.head.num_codes" and a value as typed: "none"
        for no value, a comma-separated list for a tuple ("" for the empty one).

    Raises:
      ConfigError: a path that is no field, or a value that the field does not accept.

    Example:
      apply_overrides(config, [("model.head.num_codes", "256"), ("train.steps", "1000")])
    """
    kinds_first = sorted(overrides, key=lambda override: not override[0].endswith(".kind"))
    for path, text in kinds_first:
        config = _set(config, path.split("."), path, text)
    return config


def parse_value(name: str, annotation: Any, text: str) -> Any:
    """Reads a value of type `annotation` from the command line.

    Raises:
      ConfigError: the message begins with `name` and says what is accepted.
    """
    if NoneType in alternatives(annotation) and text.lower() in ("none", "null"):
        return None
    try:
        if get_origin(annotation) is tuple:
            element = TypeAdapter(get_args(annotation)[0])
            parts = text.split(",") if text else []
            return tuple(element.validate_strings(part.strip()) for part in parts)
        return TypeAdapter(annotation).validate_strings(text)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        element_note = "each " if get_origin(annotation) is tuple else ""
        accepted = requirement(details, annotation)
        raise ConfigError(f"{name}={show(text)}: {element_note}{accepted}") from None


def _set(section: Any, names: list[str], path: str, text: str) -> Any:
    name, *rest = names
    fields = annotations(type(section))
    if name not in fields:
        raise ConfigError(unknown_field(path, type(section)))
    members = sections(fields[name])
    if not members:
        if rest:
            value_path = path.removesuffix("." + ".".join(rest))
            raise ConfigError(f"{path}: no such field; {value_path} is a value, not a section")
        return replace(section, **{name: parse_value(path, fields[name], text)})
    current = getattr(section, name)
    if not rest:
        names_inside = ", ".join(annotations(type(current)))
        choose = f"; choose its kind with {path}.kind" if len(members) > 1 else ""
        raise ConfigError(
            f"{path}={show(text)}: is a section, set one of its fields: {names_inside}{choose}"
        )
    if rest == ["kind"] and len(members) > 1:
        return replace(section, **{name: _with_kind(current, members, path, text)})
    return replace(section, **{name: _set(current, rest, path, text)})


def _with_kind(current: Any, members: tuple[type, ...], path: str, kind: str) -> Any:
    for member in members:
        if kind in kinds(member):
            old, unset = annotations(type(current)), type(current)()
            shared = {
                name: getattr(current, name)
                for name, annotation in annotations(member).items()
                if name != "kind"
                and old.get(name) == annotation
                and getattr(current, name) != getattr(unset, name)
            }
            return member(kind=kind, **shared)
    raise ConfigError(f"{path}={show(kind)}: must be one of {all_kinds(members)}")
