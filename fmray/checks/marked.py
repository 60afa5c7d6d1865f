"""YAML with a place for every key and value, so that a finding can name its line and column."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

Kind = Literal["mapping", "list", "string", "integer", "number", "boolean", "null", "timestamp", "binary"]

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_NODES = 200_000
"""A file whose aliases unfold to more than this is refused, not unfolded."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: line and column, both from 1. `Place(12, 7)`"""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the text of a block scalar begins in its file: line and column are added to those inside.

    `Origin(9, 4)`: the text's first line is line 10 of the file, indented by four. `fixed`: folded or quoted text has no
    lines of its own in the file, so everything in it stands where it begins.
    """

    line: int = 0
    column: int = 0
    fixed: bool = False

    def place(self, mark: Any) -> Place:
        """A place in the file, from PyYAML's mark (both from 0) in the text."""
        if self.fixed:
            return Place(self.line + 1, self.column + 1)
        return Place(self.line + mark.line + 1, self.column + mark.column + 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One key of a mapping and its value."""

    key: str
    place: Place
    node: Node


@dataclass(frozen=True, slots=True)
class Node:
    """A YAML value with its place. `Node("integer", Place(3, 9), 8)`"""

    kind: Kind
    place: Place
    value: Any = None
    """The scalar's value; None for mappings and lists."""
    entries: tuple[Entry, ...] = ()
    """Of a mapping, in the file's order; merge keys (`<<`) are unfolded."""
    items: tuple[Node, ...] = ()
    """Of a list."""
    inner: Origin = Origin()
    """Where the text of a string scalar begins, for YAML within YAML."""

    def get(self, *keys: str) -> Node | None:
        """The value under nested keys; None where one is missing or something is not a mapping."""
        node: Node | None = self
        for key in keys:
            found = [entry.node for entry in node.entries if entry.key == key] if node else []
            node = found[-1] if found else None
        return node

    def entry(self, key: str) -> Entry | None:
        """The key itself with its place."""
        return next((entry for entry in self.entries if entry.key == key), None)

    def list_of(self, *keys: str) -> tuple[Node, ...]:
        """The items of a list under nested keys; empty where there is none."""
        node = self.get(*keys)
        return node.items if node else ()

    def text(self, *keys: str) -> str | None:
        """The string under nested keys; None where there is none or something else."""
        node = self.get(*keys)
        return node.value if node is not None and node.kind == "string" else None

    def number(self, *keys: str) -> float | None:
        """The number under nested keys; None where there is none or something else."""
        node = self.get(*keys)
        return node.value if node is not None and node.kind in ("integer", "number") else None

    def plain(self) -> Any:
        """As yaml.safe_load gives it."""
        if self.kind == "mapping":
            return {entry.key: entry.node.plain() for entry in self.entries}
        return [item.plain() for item in self.items] if self.kind == "list" else self.value


@dataclass(frozen=True, slots=True)
class Slip:
    """Something that is wrong with the YAML itself: `Slip(Place(4, 1), "port", "stands twice", "keep one of them")`."""

    place: Place
    key: str
    problem: str
    cure: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """The documents of a text and what is wrong with it as YAML."""

    documents: tuple[Node, ...]
    slips: tuple[Slip, ...]


def parse(text: str, origin: Origin = Origin()) -> Parsed:
    """All documents of a YAML text; one that cannot be read ends the list with a slip. Empty documents are left out."""
    builder = _Builder(text, origin)
    documents: list[Node] = []
    try:
        for root in yaml.compose_all(text, Loader=LOADER):
            if root is not None and not (isinstance(root, yaml.ScalarNode) and root.value == ""):
                documents.append(builder.node(root, ""))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        cure = "mend the indentation, quotes and colons here or on the line above"
        builder.slips.append(
            Slip(origin.place(mark) if mark else Place(1, 1), "", f"is not YAML: {problem}", cure)
        )
    except yaml.YAMLError as error:  # a character that YAML does not allow: no mark
        builder.slips.append(Slip(Place(1, 1), "", f"is not YAML: {error}", "remove the character"))
    except _TooLarge:
        cure = "write the file without so many aliases"
        builder.slips.append(Slip(Place(1, 1), "", f"unfolds to more than {MOST_NODES} values", cure))
    return Parsed(tuple(documents), tuple(builder.slips))


class _TooLarge(Exception):
    """Aliases within aliases."""


class _Builder:
    """PyYAML's nodes as ours."""

    def __init__(self, text: str, origin: Origin) -> None:
        self._lines = text.split("\n")
        self._origin = origin
        self._scalars = yaml.constructor.SafeConstructor()
        self._count = 0
        self._open: list[int] = []
        self.slips: list[Slip] = []

    def node(self, node: yaml.Node, path: str) -> Node:
        self._count += 1
        if self._count > MOST_NODES or id(node) in self._open:
            raise _TooLarge
        self._open.append(id(node))
        place = self._origin.place(node.start_mark)
        if isinstance(node, yaml.MappingNode):
            made = Node("mapping", place, entries=tuple(self._entries(node, path)))
        elif isinstance(node, yaml.SequenceNode):
            items = (self.node(item, f"{path}[{number}]") for number, item in enumerate(node.value))
            made = Node("list", place, items=tuple(items))
        else:
            assert isinstance(node, yaml.ScalarNode)
            value = self._scalar(node)
            made = Node(_kind(value), place, value, inner=self._inner(node))
        self._open.pop()
        return made

    def _entries(self, node: yaml.MappingNode, path: str) -> Iterator[Entry]:
        seen: dict[str, Place] = {}
        merged: list[Entry] = []
        for key, value in node.value:
            place = self._origin.place(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self.slips.append(
                    Slip(place, path, "has a key that is no plain word", "write a string as key")
                )
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                merged += self._merged(value, path)
                continue
            inside = f"{path}.{key.value}" if path else key.value
            if key.value in seen:
                first = seen[key.value].line
                problem = f"stands twice in the same mapping (line {first} too): the later one silently wins"
                self.slips.append(Slip(place, inside, problem, "keep one of them"))
            seen[key.value] = place
            yield Entry(key.value, place, self.node(value, inside))
        yield from (entry for entry in merged if entry.key not in seen)

    def _merged(self, value: yaml.Node, path: str) -> list[Entry]:
        sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
        found: dict[str, Entry] = {}
        for source in sources:
            if isinstance(source, yaml.MappingNode):
                for entry in self.node(source, path).entries:
                    found.setdefault(entry.key, entry)
        return list(found.values())

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError):  # an unknown tag, the 31st of February
            return node.value

    def _inner(self, node: yaml.ScalarNode) -> Origin:
        mark = node.start_mark
        here = self._origin.place(mark)
        if node.style != "|" or self._origin.fixed:
            return Origin(here.line - 1, here.column - 1, fixed=True)
        # the lines of the block itself: its indentation is that of the first one which is not empty
        body = self._lines[mark.line + 1 :]
        first = next((line for line in body if line.strip()), "")
        indent = len(first) - len(first.lstrip(" "))
        return Origin(here.line, self._origin.column + indent)


def _kind(value: Any) -> Kind:
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    if isinstance(value, datetime.date):
        return "timestamp"
    if isinstance(value, bytes):
        return "binary"
    return "integer" if isinstance(value, int) else "number" if isinstance(value, float) else "string"
