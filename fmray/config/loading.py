"""From a recipe, a file and dotted overrides to one checked configuration, without importing torch.

`load_config(PretrainConfig, PRETRAIN_RECIPES, ["--recipe", "clip_tiny", "train.steps=20"])`; later wins: recipe, `--config FILE`
(YAML, TOML or JSON), then `key=value`. Everything that is wrong becomes one `ConfigError` that names key, value and cure.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fmray.config.schema import SOURCE_KINDS, Section, source_kind
from fmray.errors import ConfigError

Root = TypeVar("Root", bound=Section)
Recipes = Mapping[str, Callable[[], Root]]

CACHE_VARIABLE = "FMRAY_CACHE"
"""Environment variable that names the folder of downloaded assets."""


def cache_folder() -> Path:
    """Folder of downloaded assets: $FMRAY_CACHE, else ~/.cache/fmray."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "fmray")


OFFLINE_VARIABLE = "FMRAY_OFFLINE"
"""Environment variable that forbids downloads (1, true, yes or on)."""


def offline() -> bool:
    """Whether $FMRAY_OFFLINE forbids downloads; raises ConfigError for a value that is neither yes nor no."""
    value = os.environ.get(OFFLINE_VARIABLE, "").strip().lower()
    if value not in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        raise ConfigError(OFFLINE_VARIABLE, value, "write 1 to forbid downloads, 0 or nothing to allow them")
    return value in ("1", "true", "yes", "on")


class HelpRequested(Exception):
    """`--help` was asked for; carries the text to print."""


def load_config(root: type[Root], recipes: Recipes[Root], arguments: Sequence[str], *, door: str) -> Root:
    """The configuration that a command line asks for; raises `HelpRequested` or `ConfigError`."""
    recipe: str | None = None
    layers: list[dict[str, Any]] = []
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, _, inline = word.partition("=") if word.startswith("--") else (word, "", "")
        if flag in ("--help", "-h"):
            raise HelpRequested(describe(root, recipes, door))
        elif flag in ("--recipe", "--config"):
            value = inline or (words.pop(0) if words else "")
            if not value:
                raise ConfigError(flag, "", "needs a value")
            if flag == "--recipe":
                recipe = value
            else:
                layers.append(read_file(Path(value)))
        elif word.startswith("-"):
            dotted = word.lstrip("-")
            raise ConfigError(
                word, inline, f"unknown option; keys are written without dashes: {dotted or 'key'}=value"
            )
        else:
            overrides.append(word)
    base = _from_recipe(recipe, recipes) or _own_defaults(root)
    together: dict[str, Any] = {}  # first with each other: their order must not matter
    for override in map(parse_override, overrides):
        together = merge(together, override)
    for layer in [*layers, together]:
        base = merge(base, layer)
    return validate(root, base)


def _from_recipe(name: str | None, recipes: Recipes[Root]) -> dict[str, Any]:
    if name is None:
        return {}
    if name not in recipes:
        raise ConfigError(
            "--recipe", name, f"unknown recipe{_near(name, recipes)}; there are: {', '.join(recipes)}"
        )
    return recipes[name]().model_dump(mode="python")


def _own_defaults(root: type[BaseModel]) -> dict[str, Any]:
    """A root's default sections in full: laying one key over `run` must not lose the root's own run name."""
    defaults = {name: field.default for name, field in root.model_fields.items()}
    return {name: value.model_dump() for name, value in defaults.items() if isinstance(value, Section)}


def read_file(path: Path) -> dict[str, Any]:
    """A YAML, TOML or JSON file as nested keys."""
    if not path.is_file():
        raise ConfigError("--config", str(path), "no such file")
    try:
        text = path.read_text(encoding="utf-8")
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("--config", str(path), f"cannot be read: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError("--config", str(path), "must hold keys and values at its top level")
    return content


def parse_override(word: str) -> dict[str, Any]:
    """`train.steps=20` as `{"train": {"steps": 20}}`; values are YAML scalars and lists."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(word, None, "write key=value, such as train.steps=200")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        value = _number(value)
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _number(text: str) -> str | float:
    """YAML reads 1e-3 as a string; people mean the number."""
    try:
        return float(text) if any(character.isdigit() for character in text) else text
    except ValueError:
        return text


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section. Another kind of source replaces its section: its keys are others'."""
    if over.get("kind") in SOURCE_KINDS and base.get("kind", over["kind"]) != over["kind"]:
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both and isinstance(old, Mapping) else value
    return merged


def validate(root: type[Root], content: Mapping[str, Any]) -> Root:
    """The checked configuration, or a `ConfigError` that names every wrong key."""
    try:
        return root.model_validate(content)
    except ValidationError as error:
        raise _explain(root, error) from None


def _explain(root: type[BaseModel], error: ValidationError) -> ConfigError:
    """pydantic's findings as one error; the first gives key and value, the others follow in the text."""
    found = [_finding(root, detail) for detail in error.errors()]
    first, rest = found[0], found[1:]
    more = "".join(f"; also {key}={value!r}: {cure}" for key, value, cure in rest[:4])
    return ConfigError(first[0], first[1], first[2] + more)


def _finding(root: type[BaseModel], detail: ErrorDetails) -> tuple[str, object, str]:
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return cause.key, cause.value, cause.cure
    location = [str(part) for part in detail["loc"] if str(part) not in SOURCE_KINDS and part != "[key]"]
    key = ".".join(
        part for part in location if not part.startswith(("constrained-", "function-", "tuple[", "literal["))
    )
    value = detail["input"]
    if detail["type"] == "union_tag_invalid":
        wanted = source_kind(value)
        return f"{key}.kind", wanted, f"must be one of {', '.join(SOURCE_KINDS)}{_near(wanted, SOURCE_KINDS)}"
    if detail["type"] == "extra_forbidden":
        owner = _section_at(root, detail["loc"][:-1])
        known = list(owner.model_fields) if owner else []
        prefix = key.rpartition(".")[0]
        near = _near(location[-1], known, prefix)
        return key, value, f"unknown key{near}" + ("" if near else f"; there are: {', '.join(known)}")
    if detail["type"] == "missing":
        return key, None, f"is required; write {key}=…"
    message = detail["msg"]
    if detail["type"] == "literal_error":
        allowed = (
            str(detail.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
        )
        message = f"must be one of {', '.join(allowed)}{_near(str(value), allowed)}"
    return key, value, message[0].lower() + message[1:]


def _near(word: str, known: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else ""


def _section_at(root: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """The section class that a location of pydantic's points into."""
    current: type[BaseModel] | None = root
    for part in location:
        if current is None:
            return None
        field = current.model_fields.get(str(part))
        if field is None:
            continue  # a tag of a discriminated union, or a key of a mapping: it has led to its class already
        current = _class_in(field.annotation, location)
    return current


def _class_in(annotation: object, location: Sequence[int | str]) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, dict):
        return _class_in(arguments[0 if origin is Annotated else 1], location)
    if origin in (Union, types.UnionType):
        classes = [found for argument in arguments if (found := _class_in(argument, location))]
        tagged = [
            c for c in classes if "kind" in c.model_fields and c.model_fields["kind"].default in location
        ]
        return next(iter(tagged or classes), None)
    return None


# ------------------------------------------------------------------------------------------------------- help and dump


def describe(root: type[Root], recipes: Recipes[Root], door: str) -> str:
    """The text of `--help`: usage, recipes, every key with its type, default and doc."""
    lines = [
        f"usage: {door} [--recipe NAME] [--config FILE] [key=value …]",
        "",
        " ".join((root.__doc__ or "").split()),
        "A file (YAML, TOML, JSON) lies over the recipe, key=value over both.",
        "",
    ]
    if recipes:
        lines.append("recipes:")
        lines += [f"  {name:<16}{' '.join((make.__doc__ or '').split())}" for name, make in recipes.items()]
        lines.append("")
    lines.append("keys:")
    lines += _describe_section(root, "")
    return "\n".join(lines)


def _describe_section(section: type[BaseModel], prefix: str) -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        key, doc = prefix + name, " ".join((field.description or "").split())
        inner = field.annotation
        classes = _classes_in(inner)
        if len(classes) == 1 and classes[0] is inner:
            lines += _describe_section(classes[0], key + ".")
            continue
        if len(classes) > 1:
            for choice in classes:
                kind = choice.model_fields["kind"].default
                lines.append(f"  {key}.kind={kind}  {' '.join((choice.__doc__ or '').split())}")
                lines += [line for line in _describe_section(choice, f"{key}.") if f"{key}.kind" not in line]
            continue
        if len(classes) == 1:
            lines += [f"  {key}.<{'|'.join(_literals(inner))}>  {doc}"]
            lines += _describe_section(classes[0], f"{key}.<part>.")
            continue
        value = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
        default = "required" if field.is_required() else f"default {_plain(value)}"
        lines += [f"  {key}  ({_type_name(inner)}; {default})", f"      {doc}"]
    return lines


def _classes_in(annotation: object) -> list[type[BaseModel]]:
    """The sections that an annotation may hold: itself, a union's, a mapping's."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _classes_in(argument)]


def _literals(annotation: object) -> list[str]:
    return [
        str(value)
        for argument in get_args(annotation)
        if get_origin(argument) is Literal
        for value in get_args(argument)
    ]


def _plain(value: object) -> str:
    return (
        json.dumps(value) if isinstance(value, str | int | float | bool | list | tuple | dict) else str(value)
    )


def _type_name(annotation: object) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin is Annotated:
        return _type_name(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(argument) for argument in get_args(annotation))
    if origin is tuple:
        arguments = get_args(annotation)
        if arguments[-1] is Ellipsis:
            return f"list of {_type_name(arguments[0])}"
        return "[" + ", ".join(map(_type_name, arguments)) + "]"
    if annotation is type(None):
        return "null"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def dump_json(config: Section) -> str:
    """The resolved configuration as JSON (which, unlike TOML, keeps nulls)."""
    return config.model_dump_json(indent=2) + "\n"
