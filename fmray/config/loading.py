"""From a recipe, a file and dotted overrides to one checked configuration, without importing torch.

`load_config(PretrainConfig, PRETRAIN_RECIPES, ["--recipe", "clip_tiny", "train.steps=20"])`; later wins: recipe, `--config FILE`
(YAML, TOML or JSON), then `key=value`. Everything that is wrong becomes one `ConfigError` that names key, value and cure.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fmray.config.answers import MODEL_KINDS
from fmray.config.base import Section
from fmray.config.dialogues import DIALOGUE_KINDS
from fmray.config.help import describe
from fmray.config.prompts import PROMPT_KINDS
from fmray.config.rewards import KEPT_BY_EVERY_KIND, REWARD_KINDS
from fmray.config.schema import SOURCE_KINDS
from fmray.config.shapes import kinds_of, sections_in, walk
from fmray.config.sweep import SCHEDULER_KINDS
from fmray.errors import ConfigError

Root = TypeVar("Root", bound=Section)
Recipes = Mapping[str, Callable[[], Root]]
Task = tuple[type[Section], Mapping[str, Callable[[], Any]]]
"""A root and its recipes."""

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


@dataclass(frozen=True, slots=True)
class CommandLine:
    """`--recipe clip_tiny --config a.yaml train.steps=20` taken apart, nothing of it checked against a configuration."""

    recipe: str | None
    layers: tuple[dict[str, Any], ...]
    """Nested keys of the files, then of the overrides together; later ones lie on top."""
    help_asked: bool


def read_arguments(arguments: Sequence[str]) -> CommandLine:
    """Raises ConfigError for an option that no door has, and for a file that cannot be read."""
    recipe: str | None = None
    layers: list[dict[str, Any]] = []
    overrides: list[str] = []
    words, help_asked = list(arguments), False
    while words:
        word = words.pop(0)
        flag, _, inline = word.partition("=") if word.startswith("--") else (word, "", "")
        if flag in ("--help", "-h"):
            help_asked = True
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
    together: dict[str, Any] = {}  # first with each other: their order must not matter
    for override in map(parse_override, overrides):
        together = merge(together, override)
    return CommandLine(recipe, (*layers, together), help_asked)


def load_config(root: type[Root], recipes: Recipes[Root], arguments: Sequence[str], *, door: str) -> Root:
    """The configuration that a command line asks for; raises `HelpRequested` or `ConfigError`."""
    given = read_arguments(arguments)
    if given.help_asked:
        raise HelpRequested(describe(root, recipes, door))
    return validate(root, compose(root, recipes, given.recipe, given.layers))


def load_task(tasks: Mapping[str, Task], arguments: Sequence[str], *, door: str) -> Any:
    """As `load_config` for a door with several tasks, each with a root of its own: the recipe's, else the one that `task` names.

    Without either it is the first.
    """
    given = read_arguments(arguments)
    named = [layer["task"] for layer in given.layers if "task" in layer]
    by_recipe = [name for name, (_, recipes) in tasks.items() if given.recipe in recipes]
    task = str([*tasks][:1][0] if not (named or by_recipe) else [*named, *by_recipe][-1])
    if task not in tasks:
        raise ConfigError("task", task, f"must be one of {', '.join(tasks)}{_near(task, tasks)}")
    root, recipes = tasks[task]
    everyones = {name: make for _, theirs in tasks.values() for name, make in theirs.items()}
    if given.help_asked:
        others = [f"{door} task={name} --help" for name in tasks if name != task]
        raise HelpRequested(f"{describe(root, everyones, door)}\n\nother keys: {', '.join(others)}")
    known = recipes if given.recipe in everyones else everyones
    return validate(root, compose(root, known, given.recipe, given.layers))


def compose(
    root: type[Root], recipes: Recipes[Root], recipe: str | None, layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Nested keys of a recipe (None: the root's own defaults) with layers over it, the last one on top; not yet checked."""
    base = _from_recipe(recipe, recipes) or _own_defaults(root)
    for layer in layers:
        base = merge(base, layer)
    return base


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


KINDS: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
    (SOURCE_KINDS, ()),
    (DIALOGUE_KINDS, ()),
    (MODEL_KINDS, ()),
    (PROMPT_KINDS, ()),
    (REWARD_KINDS, KEPT_BY_EVERY_KIND),
    (SCHEDULER_KINDS, ()),
)
"""Sections that come in kinds, and their keys that mean the same in each."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section. Another kind replaces its section but for the keys that every kind has."""
    for kinds, kept in KINDS:
        if over.get("kind") in kinds and base.get("kind", over["kind"]) in {*kinds} - {over["kind"]}:
            base = {key: base[key] for key in kept if key in base}
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
    path, annotation = walk(root, detail["loc"])
    key, value = ".".join(path), detail["input"]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return _located(cause.key, path), cause.value, cause.cure
    if detail["type"] == "union_tag_invalid":
        return _wrong_kind(key, value, kinds_of(annotation))
    if detail["type"] == "extra_forbidden":
        owners = sections_in(walk(root, detail["loc"][:-1])[1])
        known = list(owners[0].model_fields) if owners else []
        near = _near(path[-1], known, ".".join(path[:-1]))
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


def _located(key: str, path: Sequence[str]) -> str:
    """A key of a section that has a name of the user's, `rewards.*.min_tokens`, with that name."""
    parts = key.split(".")
    return ".".join(path[i] if part == "*" and i < len(path) else part for i, part in enumerate(parts))


def _wrong_kind(key: str, value: object, kinds: Sequence[str]) -> tuple[str, object, str]:
    choices = f"one of {', '.join(kinds)}"
    if not isinstance(value, Mapping):
        return key, value, f"is a section of keys; its kind is {choices} ({key}.kind=…)"
    if "kind" not in value:
        return f"{key}.kind", None, f"is required; write {key}.kind=… with {choices}"
    kind = str(value["kind"])
    return f"{key}.kind", kind, f"must be {choices}{_near(kind, kinds)}"


def _near(word: str, known: Sequence[str] | Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else ""


def dump_json(config: Section) -> str:
    """The resolved configuration as JSON (which, unlike TOML, keeps nulls)."""
    return config.model_dump_json(indent=2) + "\n"
