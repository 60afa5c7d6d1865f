"""Mistakes made in the shipped files at every place where one can be made, and where each ought to be found.

In place, the file's own layout kept: a key misspelt, a value of another type, a number out of its range, a name that does
not exist, a line doubled, a line lost. On a re-written file: a key moved to another level. What is not counted as a mistake:

- in a mapping whose names are the user's (labels, environment variables, node types, mounts): a misspelt or moved name,
- a move to where the key is as legal as it was (`LEGAL_ELSEWHERE`, or where a shipped file has it),
- documents of other kinds than Ray's (the PodDisruptionBudget),
- what is a matter of taste or reads the same: a quantity without quotes (`cpu: 4`).
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
ROOT = Path(__file__).parents[3]
SHIPPED = sorted([*(ROOT / "serve_configs").glob("*.yaml"), *(ROOT / "cluster").glob("*.yaml")])
EMBEDDED = ("serveConfigV2", "runtimeEnvYAML")
USERS_NAMES = {"labels", "matchLabels", "env_vars", "file_mounts", "available_node_types", "node_config"}
QUANTITIES = {"limits", "requests", "sizeLimit"}
LEGAL_ELSEWHERE = {
    ("deployments", "logging_config"): "a deployment may log otherwise than its application",
    ("applications", "logging_config"): "and an application otherwise than Serve",
    ("ray_actor_options", "runtime_env"): "of one deployment instead of the application",
    ("autoscalerOptions", "image"): "the autoscaler may have an image of its own",
    ("autoscalerOptions", "imagePullPolicy"): "likewise",
    ("autoscalerOptions", "resources"): "likewise",
    ("autoscalerOptions", "env"): "likewise",
    ("spec", "metadata"): "a RayJob's spec has metadata of its own, for Ray's dashboard",
    ("spec", "resources"): "a pod may have resources as a whole",
}
"""(section, key): moves into a section that takes the key too."""

WRONG_NUMBERS: dict[str, tuple[object, ...]] = {
    "max_ongoing_requests": (0, 1),
    "max_queued_requests": (0,),
    "target_ongoing_requests": (0, 9999),
    "look_back_period_s": (0, 5),
    "min_replicas": (99,),
    "initial_replicas": (99,),
    "max_replicas": (0,),
    "max_items": (0, 5000),
    "deadline_seconds": (0,),
    "status_code": (430, 200),
    "max_surge_percent": (101,),
    "port": (0, 70000),
    "health_check_period_s": (0,),
    "num_gpus": (1.5,),
    "containerPort": (0, 70000),
    "minReplicas": (99,),
    "replicas": (99,),
    "activeDeadlineSeconds": (0,),
    "upscaling_speed": (0,),
    "min_workers": (99,),
    "max_images": (0,),
    "request_timeout_s": (0,),
}
"""Values beyond a bound or against another key, besides -7, which no number of these files may be."""

CLOSED_NAMES = {
    *(
        "import_path",
        "proxy_location",
        "encoding",
        "log_level",
        "apiVersion",
        "kind",
        "upscalingMode",
        "version",
    ),
    *(
        "mode",
        "submissionMode",
        "imagePullPolicy",
        "operator",
        "effect",
        "serviceType",
        "rayVersion",
        "entrypoint",
    ),
    *("head_node_type", "medium"),
}
"""Keys whose values are names that something else defines."""

REQUIRED = {
    *("applications", "import_path", "checkpoint", "apiVersion", "kind", "metadata", "spec", "headGroupSpec"),
    *("template", "containers", "groupName", "containerPort", "mountPath", "entrypoint", "rayClusterConfig"),
    *(
        "cluster_name",
        "provider",
        "head_node_type",
        "type",
        "region",
        "resources",
        "node_config",
        "rayVersion",
    ),
}
"""Keys without which a section is nothing; `resources` and `type` only in a launcher file."""


@dataclass(frozen=True)
class Mutant:
    """One mistake: the changed file, what was done to what, and what a finding must say."""

    file: str
    kind: str
    path: str
    text: str
    lines: frozenset[int]
    """Lines on which a finding names it."""
    cure_names: str | None
    """A word that the cure must hold: the key or name that was meant; None: any cure."""


@dataclass(frozen=True)
class Spot:
    """A key and its value in a file; `base`: line and column at which an embedded text begins."""

    path: tuple[str | int, ...]
    key: yaml.ScalarNode | None
    value: yaml.Node
    parent: yaml.Node
    base: tuple[int, int]

    def line(self, node: yaml.Node) -> int:
        """From 1, in the whole file."""
        return int(node.start_mark.line) + self.base[0] + 1

    @property
    def name(self) -> str:
        return dotted(self.path)


def dotted(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def sections(path: tuple[str | int, ...]) -> list[str]:
    return [part for part in path if isinstance(part, str)]


def generic(path: tuple[str | int, ...]) -> tuple[str, ...]:
    """A path with the numbers of lists and the names of node types taken out."""
    words = sections(path)
    return tuple(
        "*" if i and words[i - 1] == "available_node_types" else word for i, word in enumerate(words)
    )


def spots(text: str) -> Iterator[Spot]:
    """Every key of every Ray document of a file, those of embedded texts too."""
    for root in yaml.compose_all(text, Loader=LOADER):
        kind = next((value.value for key, value in root.value if key.value == "kind"), None)
        if kind is None or str(kind).startswith("Ray"):
            yield from _below(root, (), (0, 0), text.split("\n"))


def _below(
    node: yaml.Node, path: tuple[str | int, ...], base: tuple[int, int], lines: list[str]
) -> Iterator[Spot]:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _below(item, (*path, number), base, lines)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        inside = (*path, key.value)
        yield Spot(inside, key, value, node, base)
        if key.value in EMBEDDED and getattr(value, "style", None) == "|":
            first = value.start_mark.line + 1
            indent = len(lines[first]) - len(lines[first].lstrip())
            root = yaml.compose(value.value, Loader=LOADER)
            yield from _below(root, inside, (first, indent), lines)
        else:
            yield from _below(value, inside, base, lines)


def typo(word: str, rng: random.Random) -> str:
    """One slip of the fingers: a letter lost, doubled, swapped with the next, or hit beside."""
    letters = [i for i, letter in enumerate(word) if letter.isalpha()]
    while True:
        at, how = rng.choice(letters), rng.randrange(4)
        if how == 0:
            made = word[:at] + word[at + 1 :]
        elif how == 1:
            made = word[:at] + word[at] + word[at:]
        elif how == 2:
            made = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
        else:
            made = word[:at] + rng.choice("aeiorstn") + word[at + 1 :]
        if made and made.lower() != word.lower():
            return made


def replaced(text: str, spot: Spot, node: yaml.Node, new: str) -> str:
    """The file with one node's text changed, nothing else moved."""
    lines = text.split("\n")
    first, last = node.start_mark, node.end_mark
    top, left = spot.base
    head = lines[first.line + top][: first.column + left]
    tail = lines[last.line + top][last.column + left :] if last.line + top < len(lines) else ""
    lines[first.line + top : last.line + top + 1] = [head + new + tail]
    return "\n".join(lines)


def mutants(path: Path, rng: random.Random) -> Iterator[Mutant]:
    """Every mistake of every kind that can be made in one file."""
    text = path.read_text(encoding="utf-8")
    found = list(spots(text))
    for spot in found:
        yield from _misspelt(path.name, text, spot, rng)
        yield from _retyped(path.name, text, spot, rng)
        yield from _out_of_range(path.name, text, spot)
        yield from _no_such_name(path.name, text, spot, rng)
        yield from _doubled(path.name, text, spot)
        yield from _lost(path.name, text, spot)
    yield from _moved(path.name, text, found, rng)


def _names_are_users(path: tuple[str | int, ...]) -> bool:
    words = sections(path)
    return len(words) > 1 and words[-2] in USERS_NAMES and words[-2] != "node_config"


def _misspelt(file: str, text: str, spot: Spot, rng: random.Random) -> Iterator[Mutant]:
    if spot.key is None or _names_are_users(spot.path):
        return
    key = spot.key.value
    made = typo(key, rng)
    changed = replaced(text, spot, spot.key, made)
    yield Mutant(file, "misspelt", spot.name, changed, frozenset({spot.line(spot.key)}), key)


def _retyped(file: str, text: str, spot: Spot, rng: random.Random) -> Iterator[Mutant]:
    node, words = spot.value, sections(spot.path)
    line = frozenset({spot.line(node)})
    if isinstance(node, yaml.ScalarNode):
        if node.style in ("|", ">"):
            return
        value = yaml.safe_load(node.value) if not node.style else node.value
        quantity = bool({*words[-2:]} & QUANTITIES)
        if isinstance(value, bool):
            new = rng.choice(['"perhaps"', "3"])
        elif isinstance(value, int | float):
            new = rng.choice([f'"{node.value}"', "many", "[1]"])
        else:
            new = rng.choice(["[a, b]", "{a: b}"] if quantity else ["[a, b]", "{a: b}", "7", "true"])
    elif node.value:
        new = rng.choice(["7", "text"])
        if len(node.value) and node.start_mark.line != node.end_mark.line:
            return  # a block: other kinds of mistakes reach it
    else:
        return
    yield Mutant(file, "retyped", spot.name, replaced(text, spot, node, new), line, None)


def _out_of_range(file: str, text: str, spot: Spot) -> Iterator[Mutant]:
    node = spot.value
    if not isinstance(node, yaml.ScalarNode) or node.style:
        return
    value = yaml.safe_load(node.value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    for new in (-7, *WRONG_NUMBERS.get(str(spot.path[-1]), ())):
        if new == value:
            continue
        # a bound against another key is named at either of the two
        lines = {spot.line(node)} | {
            other.start_mark.line + spot.base[0] + 1
            for key, other in spot.parent.value
            if new not in (-7, 0) and re.search("replicas|requests|workers|Replicas", key.value)
        }
        if spot.path[-1] == "max_items" and new == 5000:
            lines = set(range(1, text.count("\n") + 2))  # named at max_ongoing_requests
        changed = replaced(text, spot, node, str(new))
        yield Mutant(file, "out of range", f"{spot.name}={new}", changed, frozenset(lines), None)


def _no_such_name(file: str, text: str, spot: Spot, rng: random.Random) -> Iterator[Mutant]:
    node, words = spot.value, sections(spot.path)
    if not isinstance(node, yaml.ScalarNode) or node.style in ("|",) or not node.value:
        return
    mounts = words[-2:] == ["volumeMounts", "name"]
    deployment = words[-2:] == ["deployments", "name"]
    provider = words[-2:] == ["provider", "type"]
    if not (words[-1] in CLOSED_NAMES or mounts or deployment or provider) or words[-1] == "medium":
        return
    line, value = frozenset({spot.line(node)}), node.value
    if words[-1] == "rayVersion":
        yield Mutant(file, "name", spot.name, replaced(text, spot, node, '"2.59.0"'), line, "2.60.0")
        return
    if words[-1] == "entrypoint":
        for old in ("python", "jobs.pretrain", "clip_tiny", "runtime.workers"):
            made = value.replace(old, typo(old, rng), 1)
            yield Mutant(
                file, "name", f"{spot.name} {old}", replaced(text, spot, node, f'"{made}"\n'), line, None
            )
        return
    if words[-1] == "import_path":
        module, _, attribute = value.partition(":")
        last = module.rpartition(".")
        made = [
            f"{module}:{attribute}x",
            f"{last[0]}.{typo(last[2], rng)}:{attribute}",
            f"{typo('fmray', rng)}.x:app",
        ]
        for new in made:
            yield Mutant(file, "name", f"{spot.name}={new}", replaced(text, spot, node, new), line, None)
        return
    yield Mutant(file, "name", spot.name, replaced(text, spot, node, typo(value, rng)), line, value)


def _doubled(file: str, text: str, spot: Spot) -> Iterator[Mutant]:
    """The line of a scalar written a second time."""
    if spot.key is None or spot.parent.flow_style or not isinstance(spot.value, yaml.ScalarNode):
        return
    number, lines = spot.line(spot.key) - 1, text.split("\n")
    if spot.value.style in ("|", ">") or lines[number].lstrip().startswith("- "):
        return
    lines.insert(number, lines[number])
    yield Mutant(file, "doubled", spot.name, "\n".join(lines), frozenset({number + 2}), None)


def _lost(file: str, text: str, spot: Spot) -> Iterator[Mutant]:
    """A required key removed; named where its section begins."""
    key = str(spot.path[-1])
    launcher = "cluster_name" in text
    if key not in REQUIRED or (key in ("type", "resources") and not launcher):
        return
    if key == "checkpoint" and spot.path[-2] != "args":
        return  # a user_config need not say it
    changed = _without(text, spot.path)
    yield Mutant(file, "lost", spot.name, changed, frozenset({_line_of(changed, spot.path[:-1])}), key)


def _line_of(text: str, path: tuple[str | int, ...]) -> int:
    """Where the section at a path begins."""
    inside = [one for one in spots(text) if one.path[:-1] == path]
    own = _spots_by_path(text).get(path)
    if not inside or (own is not None and own.value.start_mark.line == own.parent.start_mark.line):
        assert own is not None
        return own.line(own.value)
    return min(one.line(one.key) for one in inside if one.key is not None)


def _spots_by_path(text: str) -> dict[tuple[str | int, ...], Spot]:
    return {spot.path: spot for spot in spots(text)}


class _Block(str):
    """A string that is dumped as a block, as in the shipped files."""


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):
    """Knows blocks."""


_Dumper.add_representer(
    _Block, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", str(value), "|")
)


def _load(text: str) -> list[Any]:
    documents = list(yaml.load_all(text, Loader=LOADER))
    for document in documents:
        spec = document.get("spec") or {}
        for key in EMBEDDED:
            if key in spec:
                spec[key] = yaml.safe_load(spec[key])
    return documents


def _dump(documents: list[Any]) -> str:
    documents = copy.deepcopy(documents)
    for document in documents:
        spec = document.get("spec")
        for key in EMBEDDED:
            if isinstance(spec, dict) and key in spec:
                spec[key] = _Block(yaml.dump(spec[key], Dumper=_Dumper, sort_keys=False))
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False)


def _at(documents: list[Any], path: tuple[str | int, ...]) -> Any:
    here = documents[0]
    for part in path:
        here = here[part]
    return here


def _without(text: str, path: tuple[str | int, ...]) -> str:
    documents = _load(text)
    del _at(documents, path[:-1])[path[-1]]
    return _dump(documents)


@cache
def _legal_paths() -> frozenset[tuple[str, ...]]:
    """Where the shipped files have keys."""
    texts = [path.read_text(encoding="utf-8") for path in SHIPPED]
    return frozenset(generic(spot.path) for text in texts for spot in spots(text))


def _moved(file: str, text: str, found: list[Spot], rng: random.Random) -> Iterator[Mutant]:
    """Each key moved one section up, and into a section beside it."""
    legal, whole = _legal_paths(), _load(text)
    for spot in found:
        if _names_are_users(spot.path) or spot.path[-1] in EMBEDDED:
            continue
        for target in _targets(whole, spot.path, rng):
            key = str(spot.path[-1])
            section = sections(target)[-1] if sections(target) else ""
            into = _at(whole, target)
            if key in into or generic((*target, key)) in legal or (section, key) in LEGAL_ELSEWHERE:
                continue
            if section in USERS_NAMES | QUANTITIES:
                continue
            documents = copy.deepcopy(whole)
            value = _at(documents, spot.path[:-1]).pop(key)
            _at(documents, target)[key] = value
            changed = _dump(documents)
            now = _spots_by_path(changed).get((*target, key))
            if now is None or now.key is None:
                continue
            name = f"{spot.name} into {dotted(target) or 'the top'}"
            yield Mutant(file, "moved", name, changed, frozenset({now.line(now.key)}), key)


def _targets(
    documents: list[Any], path: tuple[str | int, ...], rng: random.Random
) -> list[tuple[str | int, ...]]:
    up = path[:-1]
    while up and (isinstance(up[-1], int) or not isinstance(_at(documents, up[:-1]), dict)):
        up = up[:-1]
    above = [up[:-1]] if up and isinstance(_at(documents, up[:-1]), dict) else []
    beside = [
        (*path[:-1], key)
        for key, value in _at(documents, path[:-1]).items()
        if isinstance(value, dict) and key != path[-1] and key not in EMBEDDED
    ]
    return above + ([rng.choice(beside)] if beside else [])
