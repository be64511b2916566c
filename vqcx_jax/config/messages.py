"""Pydantic's findings in the words of a user: one line with field, value and what is accepted."""

from difflib import get_close_matches
from types import NoneType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from vqcx_jax.config.fields import (
    all_kinds,
    alternatives,
    annotations,
    field_paths,
    join,
    kinds,
    section_paths,
    sections,
)

_LONGEST_VALUE = 80


def did_you_mean(name: str, known: tuple[str, ...]) -> str:
    """A hint to append to a message: empty if nothing known is near."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def show(value: Any) -> str:
    """A value as it goes into a message: one line, and not a page of it."""
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def unknown_field(path: str, section: type) -> str:
    """Message for a path whose last known part is `section`."""
    known = field_paths()
    accepted = ", ".join(annotations(section))
    where = section_paths()[section] or "the configuration"
    if path in known:  # A field of another kind of this section.
        kind_path = join(where, "kind")
        owners = (cls for cls, at in section_paths().items() if at == where)
        name = path.rpartition(".")[2]
        wanted = [kind for cls in owners if name in annotations(cls) for kind in kinds(cls)]
        hint = f" with this {kind_path} (only with {' or '.join(wanted)})"
    else:
        hint = did_you_mean(path, known)
    return f"{path}: no such field{hint}; {where} accepts {accepted}"


def requirement(details: ErrorDetails, annotation: Any) -> str:
    """What a field of type `annotation` accepts, given pydantic's complaint about its value."""
    message = details["msg"].replace("Input should be", "must be").split(", unable to")[0]
    if details["type"] == "int_parsing_size":
        message = "must be an integer of fewer digits"
    return message + (", or none" if NoneType in alternatives(annotation) else "")


def describe(error: ValidationError) -> str:
    """The first problem of a configuration object that could not be made.

    Args:
      error: raised by a class of the schema, or by validating a `Config` as a whole.
    """
    details = error.errors(include_url=False)[0]
    roots = {cls.__name__: cls for cls in section_paths()}
    if error.title not in roots:  # A pydantic model of the user's own.
        return f"{error.title}: {details['msg']}"
    section = roots[error.title]
    path = section_paths()[section]
    annotation: Any = section
    for step in details["loc"]:
        members = sections(annotation)
        if isinstance(step, int):
            continue  # An element of a tuple, or a positional argument: named by its value.
        if len(members) > 1:  # The step names the kind.
            annotation = next(member for member in members if step in kinds(member))
            continue
        section = members[0]
        path = join(path, step)
        annotation = annotations(section).get(step)

    if details["type"] == "unexpected_keyword_argument":
        return unknown_field(path, section)
    members = sections(annotation)
    value = details["input"]
    if details["type"] == "union_tag_not_found":
        return f"{join(path, 'kind')}: missing; must be one of {all_kinds(members)}"
    if details["type"] == "union_tag_invalid":
        tag = details["ctx"]["tag"]
        return f"{join(path, 'kind')}={tag!r}: must be one of {all_kinds(members)}"
    label = f"{path or 'the configuration'}={show(value)}"
    if members:
        return f"{label}: must be a {' or '.join(member.__name__ for member in members)}"
    return f"{label}: {requirement(details, annotation)}"
