"""What a configuration's annotations hold: sections, sections of one of several kinds, mappings of them."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def bare(annotation: object) -> object:
    """Without `Annotated`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def is_section(annotation: object) -> bool:
    """Whether an annotation is a section itself."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def is_union(annotation: object) -> bool:
    """Whether an annotation says "one of these"."""
    return get_origin(annotation) in (Union, types.UnionType)


def members(annotation: object) -> list[object]:
    """What a union may be, `None` left out; another annotation alone."""
    annotation = bare(annotation)
    if not is_union(annotation):
        return [annotation]
    return [bare(member) for member in get_args(annotation) if member is not type(None)]


def sections_in(annotation: object) -> list[type[BaseModel]]:
    """The sections that a value may be: the annotation itself, or a union's members."""
    return [member for member in members(annotation) if isinstance(member, type) and is_section(member)]


def mapped_to(annotation: object) -> tuple[object, object] | None:
    """The key's and the value's annotation of a mapping, else None."""
    annotation = bare(annotation)
    if get_origin(annotation) is not dict:
        return None
    key, value = get_args(annotation)
    return key, value


def kind_of(section: type[BaseModel]) -> str:
    """The `kind` that a section of several kinds is chosen by; empty where it has none."""
    field = section.model_fields.get("kind")
    return str(field.default) if field else ""


def kinds_of(annotation: object) -> list[str]:
    """The kinds to choose from."""
    return [kind_of(section) for section in sections_in(annotation)]


def literals_in(annotation: object) -> list[str]:
    """The words that a `Literal` allows."""
    annotation = bare(annotation)
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


def walk(root: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], object]:
    """A location of pydantic's as the user's dotted key, and the annotation of what stands there.

    pydantic also puts a union's tag, or a label of the member it tried, into the location: those are no keys.
    """
    path: list[str] = []
    here: object = root
    for part in location:
        if part == "[key]":  # the mapping's key itself is wrong; it stands before
            continue
        choices = members(here)
        if len(choices) > 1:  # the part is a tag or a label: it chooses a member, or names one that was tried
            here = next((section for section in sections_in(here) if kind_of(section) == part), None)
            continue
        here = choices[0] if choices else None
        mapping = mapped_to(here)
        if isinstance(here, type) and issubclass(here, BaseModel):
            field = here.model_fields.get(str(part))
            here = field.annotation if field else None
            path.append(str(part))
        elif mapping is not None:
            here = mapping[1]
            path.append(str(part))
        elif isinstance(part, int):
            here = None
            path.append(str(part))
    return path, here
