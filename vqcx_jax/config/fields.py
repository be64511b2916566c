"""What the schema says about itself: sections, their fields, and the paths that lead to them."""

import dataclasses
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from vqcx_jax.config.schema import Config


def annotations(section: type) -> dict[str, Any]:
    """The fields of a section and their types, constraints included."""
    return get_type_hints(section, include_extras=True)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; of anything else, itself."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def sections(annotation: Any) -> tuple[type, ...]:
    """The section classes that a field may hold: none if the field is a plain value."""
    members = alternatives(annotation)
    return tuple(m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m))


def kinds(section: type) -> tuple[str, ...]:
    """The values of `kind` that select this class."""
    return get_args(annotations(section)["kind"])


def all_kinds(members: tuple[type, ...]) -> str:
    """The kinds of several classes, for a message: "'vq', 'full'"."""
    return ", ".join(repr(kind) for member in members for kind in kinds(member))


def join(path: str, name: str) -> str:
    """The path of a field of the section at `path`; the root's path is empty."""
    return f"{path}.{name}" if path else name


def _walk(annotation: Any, path: str) -> Iterator[tuple[type, str]]:
    for section in sections(annotation):
        yield section, path
        for name, field in annotations(section).items():
            yield from _walk(field, join(path, name))


@cache
def section_paths() -> dict[type, str]:
    """Every section class of the schema and where it stands: VQHead -> "model.head"."""
    return dict(_walk(Config, ""))


@cache
def field_paths() -> tuple[str, ...]:
    """The path of every field of every section class."""
    paths = (join(path, name) for cls, path in section_paths().items() for name in annotations(cls))
    return tuple(dict.fromkeys(paths))
