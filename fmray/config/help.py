"""The text of `--help`: every key of a configuration with its type, its default and its doc."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fmray.config.base import Section
from fmray.config.shapes import (
    bare,
    is_section,
    is_union,
    kind_of,
    literals_in,
    mapped_to,
    members,
    sections_in,
)


def describe(root: type[Section], recipes: Mapping[str, Callable[[], Any]], door: str) -> str:
    """The text of `--help`: usage, recipes, every key with its type, default and doc."""
    lines = [
        f"usage: {door} [--recipe NAME] [--config FILE] [key=value …]",
        "",
        _one_line(root.__doc__),
        "A file (YAML, TOML, JSON) lies over the recipe, key=value over both.",
        "",
    ]
    if recipes:
        lines.append("recipes:")
        lines += [f"  {name:<18}{_one_line(make.__doc__)}" for name, make in recipes.items()]
        lines.append("")
    lines.append("keys:")
    lines += _Keys().section(root, _defaults(root), "")
    return "\n".join(lines)


class _Keys:
    """The lines of all keys; those of a section that stands in several places are told once."""

    def __init__(self) -> None:
        self._told: dict[type[BaseModel], tuple[str, Mapping[str, Any]]] = {}

    def section(self, section: type[BaseModel], defaults: Mapping[str, Any], prefix: str) -> list[str]:
        return [
            line
            for name, field in section.model_fields.items()
            for line in self.key(prefix + name, field, defaults)
        ]

    def key(self, key: str, field: FieldInfo, defaults: Mapping[str, Any]) -> list[str]:
        name, doc = key.rpartition(".")[2], _one_line(field.description)
        mapping = mapped_to(field.annotation)
        if mapping and sections_in(mapping[1]):
            named = f"{key}.<{name.removesuffix('s')}>"
            names = " | ".join(literals_in(mapping[0])) or "a name of yours"
            return [*_entry(named, names, doc), *self.inside(named, mapping[1], {})]
        default = f"default {_plain(defaults[name])}" if name in defaults else "required"
        if not sections_in(field.annotation):
            return _entry(key, f"{_type_name(field.annotation)}; {default}", doc)
        value = dict(defaults[name]) if isinstance(defaults.get(name), BaseModel) else {}
        inside = self.inside(key, field.annotation, value)
        return inside if is_section(bare(field.annotation)) else [*_entry(key, default, doc), *inside]

    def inside(self, key: str, annotation: object, defaults: Mapping[str, Any]) -> list[str]:
        """The keys of one section, or of all the kinds of one."""
        first, *others = sections_in(annotation)
        if others:
            return self.kinds(key, [first, *others])
        values = defaults or _defaults(first)
        if first not in self._told or len(values) <= 3:
            self._told[first] = (key, values)
            return self.section(first, values, f"{key}.")
        place, there = self._told[first]
        others_than_there = {name: value for name, value in values.items() if there.get(name) != value}
        but = f" with {_plain(others_than_there)}" if others_than_there else ""
        return [f"  {key}.…  the keys of {place}{but}"]

    def kinds(self, key: str, sections: list[type[BaseModel]]) -> list[str]:
        """What all kinds have, once; then each kind with its own keys."""
        fields = [section.model_fields for section in sections]
        shared = [
            name
            for name, field in fields[0].items()
            if name != "kind" and all(name in f and f[name].annotation == field.annotation for f in fields)
        ]
        defaults = _defaults(sections[0])
        lines = _entry(f"{key}.kind", " | ".join(map(kind_of, sections)), "")
        lines += [line for name in shared for line in self.key(f"{key}.{name}", fields[0][name], defaults)]
        for section in sections:
            lines += [f"  {key}.kind={kind_of(section)}  {_one_line(section.__doc__)}"]
            own = _defaults(section)
            for name, field in section.model_fields.items():
                differs = name in shared and _plain(own.get(name)) != _plain(defaults.get(name))
                if name != "kind" and (name not in shared or differs):
                    lines += self.key(f"{key}.{name}", field, own)
        return lines


def _entry(key: str, what: str, doc: str) -> list[str]:
    return [f"  {key}  ({what})", *([f"      {doc}"] if doc else [])]


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    """The defaults of a section's keys; the required ones are not in it."""
    fields = section.model_fields.items()
    return {n: f.get_default(call_default_factory=True) for n, f in fields if not f.is_required()}


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, BaseModel):
        return _plain(dict(value))
    return (
        json.dumps(value) if isinstance(value, str | int | float | bool | list | tuple | None) else str(value)
    )


def _type_name(annotation: object) -> str:
    annotation = bare(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if is_union(annotation):
        names = [_type_name(member) for member in members(annotation)]
        return " | ".join([*names, *(["null"] if type(None) in arguments else [])])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type_name(arguments[0])}"
        return "[" + ", ".join(map(_type_name, arguments)) + "]"
    if origin is dict:
        return f"{{{_type_name(arguments[0])}: {_type_name(arguments[1])}}}"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
