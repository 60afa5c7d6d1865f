"""A marked YAML tree against a JSON schema read strictly: every key that the schema does not name is a mistake.

Besides JSON Schema's own words it knows some of ours:
`x-known`      names that an open mapping usually holds: another name is fine unless it looks like a slip of one of them
`x-guarded`    an open mapping in which a key of the sections around it is a mistake
`x-elsewhere`  keys that belong to another place: `{"host": "http_options"}`
`x-deprecated` what to write instead of a key that still works
`x-variables`  environment variables: one that looks like Ray's or ours and is not is a slip
`x-says`       the sentence for a value that does not match `pattern`
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from fmray.checks.findings import Finding, Report, closest, did_you_mean, joined, nearest, shown
from fmray.checks.marked import Entry, Node
from fmray.checks.variables import strange_variable

Schema = Mapping[str, Any]

NAMES = {
    "object": "a mapping of keys",
    "array": "a list",
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "empty",
}
KINDS = {"mapping": "object", "list": "array"}
NEARLY_SURE = 0.84
"""How alike a name of an open mapping must be to a known one to be called a slip of it."""


SHORT = 4
"""Up to so many letters one slip changes so much that a name only half alike is taken for one."""


BOUNDS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("minimum", operator.ge, "at least"),
    ("exclusiveMinimum", operator.gt, "greater than"),
    ("maximum", operator.le, "at most"),
    ("exclusiveMaximum", operator.lt, "less than"),
)


class Level(NamedTuple):
    """A section that encloses another: its path in the file and its schema."""

    path: str
    schema: Schema


class StrictSchema:
    """One kind of file. `StrictSchema(schema, {"max_concurrent_queries": "max_ongoing_requests"}).check(node, report)`"""

    def __init__(self, root: Schema, renamed: Mapping[str, str] | None = None) -> None:
        self._root = root
        self._renamed = renamed or {}
        self._homes: dict[str, str] | None = None

    def check(self, node: Node, report: Report, path: str = "", at: Schema | None = None) -> None:
        """All that the schema forbids; `at`: a part of the root's schema instead of the whole."""
        self._walk(node, self._root if at is None else at, path, (), report)

    def resolve(self, schema: Schema) -> Schema:
        """The schema itself where `$ref` names it; what stands beside the `$ref` lies on top."""
        while "$ref" in schema:
            target: Any = self._root
            for part in schema["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
        return schema

    def _walk(self, node: Node, schema: Schema, path: str, above: tuple[Level, ...], report: Report) -> None:
        schema = self.resolve(schema)
        choices = [self.resolve(choice) for choice in schema.get("anyOf", schema.get("oneOf", ()))]
        if choices:
            self._one_of(node, choices, path, above, report)
        elif self._kind_fits(node, schema, path, report):
            if node.kind == "mapping":
                self._mapping(node, schema, path, above, report)
            elif node.kind == "list":
                self._list(node, schema, path, above, report)
            else:
                _scalar(node, schema, path, report)

    def _one_of(
        self, node: Node, choices: list[Schema], path: str, above: tuple[Level, ...], report: Report
    ) -> None:
        fitting = [choice for choice in choices if _fits(node, choice)]
        if not fitting:
            wanted = [choice for choice in choices if choice.get("type") != "null"] or choices
            names = [
                " or ".join(map(str, choice["enum"])) if "enum" in choice else NAMES[_types(choice)[0]]
                for choice in wanted
            ]
            _wrong_kind(node, [_types(choice)[0] for choice in wanted], " or ".join(names), path, report)
            return
        trials: list[list[Finding]] = []
        for choice in fitting:
            trial = report.scratch()
            self._walk(node, choice, path, above, trial)
            trials.append(trial.findings)
        fewest: list[Finding] = min(trials, key=len)
        report.findings += fewest

    def _kind_fits(self, node: Node, schema: Schema, path: str, report: Report) -> bool:
        if _fits(node, schema):
            return True
        types = _types(schema)
        keys = self.resolve(schema).get("properties", {})
        name = " or ".join(NAMES[kind] for kind in types if kind != "null")
        if "enum" in schema and node.kind not in ("mapping", "list"):
            report.error(
                node, path, f"is {shown(node)}", f"must be one of {', '.join(map(str, schema['enum']))}"
            )
            return False
        more = f" ({', '.join(list(keys)[:6])}{', …' if len(keys) > 6 else ''})" if keys else ""
        _wrong_kind(node, types, name + more, path, report)
        return False

    def _list(self, node: Node, schema: Schema, path: str, above: tuple[Level, ...], report: Report) -> None:
        first = schema.get("prefixItems", ())
        if len(node.items) < schema.get("minItems", 0):
            report.error(node, path, f"holds {len(node.items)}", f"write at least {schema['minItems']}")
        for number, item in enumerate(node.items):
            at = first[number] if number < len(first) else schema.get("items", {})
            self._walk(item, at, f"{path}[{number}]", above, report)

    def _mapping(
        self, node: Node, schema: Schema, path: str, above: tuple[Level, ...], report: Report
    ) -> None:
        known, meant = schema.get("properties", {}), set()
        here = (*above, Level(path, schema))
        for entry in node.entries:
            inside = joined(path, entry.key)
            if entry.key in known:
                deprecated = self.resolve(known[entry.key]).get("x-deprecated")
                if deprecated:
                    report.warning(entry.place, inside, "is an old key", str(deprecated))
                self._walk(entry.node, known[entry.key], inside, here, report)
            elif _open(schema):
                self._free(entry, schema, path, here, report)
            else:
                problem, cure, name = self._stray(entry.key, here)
                meant.add(name)
                report.error(entry.place, inside, problem, cure)
        present = {entry.key for entry in node.entries}
        for key in schema.get("required", ()):
            if key not in present and key not in meant:
                report.error(node, joined(path, key), "is required, and missing", f"write {key}: … here")

    def _free(self, entry: Entry, schema: Schema, path: str, here: tuple[Level, ...], report: Report) -> None:
        names = schema.get("x-known", ())
        home = self._near_home(entry.key, here) if schema.get("x-guarded") else None
        if home and entry.key not in (*names, *schema.get("properties", ())):
            report.error(
                entry.place, joined(path, entry.key), f"{entry.key} does not belong here", f"it {home}"
            )
            return
        near = None
        if entry.key not in names:
            near = closest(entry.key, names, NEARLY_SURE if len(entry.key) > SHORT else 0.6)
        if near:
            problem = "unknown name"
            report.error(entry.place, joined(path, entry.key), problem, f"did you mean {near}?")
        pattern = schema.get("propertyNames", {}).get("pattern")
        if pattern and not near and not re.fullmatch(pattern, entry.key):
            says = schema["propertyNames"].get("x-says", f"must match {pattern}")
            report.error(entry.place, joined(path, entry.key), "unknown name", says)
        if schema.get("x-variables"):
            cure = strange_variable(entry.key)
            if cure:
                report.error(entry.place, joined(path, entry.key), "is a variable that nothing reads", cure)
        inner = schema.get("additionalProperties")
        inner = next(iter(schema.get("patternProperties", {}).values()), inner)
        if isinstance(inner, Mapping):
            self._walk(entry.node, inner, joined(path, entry.key), here, report)

    def _stray(self, key: str, here: tuple[Level, ...]) -> tuple[str, str, str]:
        """For a key that its section does not have: what is wrong, the cure, and the key that was meant."""
        section = here[-1].schema
        known = section.get("properties", {})
        if key in section.get("x-elsewhere", {}):
            return f"{key} does not belong here", f"it belongs into {section['x-elsewhere'][key]}", key
        if key in self._renamed:
            name = self._renamed[key]
            where = "" if name in known else f" {self._home_of(name, here) or ''}".rstrip()
            return "unknown key: an old name, silently ignored", f"write {name}{where}", name
        near = closest(key, known, 0.75)
        home = None if near and key.lower() == near.lower() else self._near_home(key, here)
        if home is None and near is None:
            home = self._far_home(key)
        if home:
            return f"{key} does not belong here", f"it {home}", key
        if near is None:
            near = closest(key, known)
        if near:
            return "unknown key", f"did you mean {' or '.join(nearest(key, known)[:3])}?", near
        relatives = [*here[:-1], *(Level(name, child) for name, child in self._children(section))]
        for level in reversed(relatives):
            near = closest(key, level.schema.get("properties", {}), NEARLY_SURE)
            if near:
                return "unknown key", f"did you mean {near}, which {self._home_of(near, here)}?", near
        return "unknown key", did_you_mean(key, list(known)), key

    def _home_of(self, key: str, here: tuple[Level, ...]) -> str | None:
        return self._near_home(key, here) or self._far_home(key)

    def _near_home(self, key: str, here: tuple[Level, ...]) -> str | None:
        """Where a key belongs among the sections around: above, nearest first, or one below."""
        for steps, level in enumerate(reversed(here[:-1]), 1):
            if key in level.schema.get("properties", {}):
                levels = "one level" if steps == 1 else f"{steps} levels"
                return f"belongs {levels} up, into {level.path or 'the top level'}"
        for name, child in self._children(here[-1].schema):
            if key in child.get("properties", {}):
                return f"belongs into {name}"
        return None

    def _far_home(self, key: str) -> str | None:
        if self._homes is None:
            self._homes = dict(reversed([*self._everywhere()]))
        return f"belongs into {self._homes[key]}" if key in self._homes else None

    def _children(self, schema: Schema) -> Iterator[tuple[str, Schema]]:
        """Sections directly inside one, lists of sections too."""
        for name, inner in schema.get("properties", {}).items():
            for part in self._parts(inner):
                if "items" in part:
                    yield from (
                        (f"{name}[…]", item) for item in self._parts(part["items"]) if "properties" in item
                    )
                elif "properties" in part:
                    yield name, part

    def _parts(self, schema: Schema) -> list[Schema]:
        schema = self.resolve(schema)
        return [self.resolve(choice) for choice in schema.get("anyOf", (schema,))]

    def _everywhere(self) -> Iterator[tuple[str, str]]:
        """Every key with the section that has it, the shallowest first."""
        waiting: list[tuple[str, Schema, int]] = [("", self.resolve(self._root), 0)]
        while waiting:
            path, schema, depth = waiting.pop(0)
            for name in schema.get("properties", {}):
                yield name, path or "the top level"
            if depth < 9:
                waiting += [(joined(path, name), child, depth + 1) for name, child in self._children(schema)]


def _types(schema: Schema) -> list[str]:
    kind = schema.get("type")
    if kind is None:
        return ["object"] if "properties" in schema else ["string"] if "enum" in schema else list(NAMES)
    return [kind] if isinstance(kind, str) else list(kind)


def _fits(node: Node, schema: Schema) -> bool:
    if "enum" in schema and "type" not in schema:
        return node.kind == "string"
    kind, types = KINDS.get(node.kind, node.kind), _types(schema)
    if "type" not in schema and "properties" not in schema:
        return True
    return kind in types or (kind == "integer" and "number" in types)


def _open(schema: Schema) -> bool:
    """Whether a mapping may hold keys of the user's: said so, or nothing said of its keys at all."""
    inner = schema.get("additionalProperties")
    if isinstance(inner, Mapping) or inner is True or "patternProperties" in schema:
        return True
    return inner is None and "properties" not in schema


def _wrong_kind(node: Node, types: list[str], name: str, path: str, report: Report) -> None:
    cure = f"write {name}"
    if node.kind == "string" and {"integer", "number"} & {*types}:
        try:
            number = float(node.value)
            cure = f"write {int(number) if number == int(number) else number} without quotes"
        except (ValueError, OverflowError):
            cure = f"write {name}"
    elif (
        node.kind == "string" and "boolean" in types and node.value.lower() in ("true", "false", "yes", "no")
    ):
        cure = f"write {'true' if node.value.lower() in ('true', 'yes') else 'false'} without quotes"
    elif "string" in types and node.kind in ("integer", "number", "boolean", "timestamp"):
        cure = "put it in quotes"
    elif node.kind == "null":
        cure = f"write {name}, or remove the key"
    elif "array" in types and node.kind != "mapping":
        cure = "write a list: [ … ], or lines that begin with '- '"
    report.error(node, path, f"is {shown(node)}, where {name} belongs", cure)


def _scalar(node: Node, schema: Schema, path: str, report: Report) -> None:
    value = node.value
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed is not None and node.kind != "null":
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            near = closest(str(value), map(str, allowed))
            cure = f"must be one of {', '.join(map(str, allowed))}"
            report.error(node, path, f"is {shown(node)}", f"{cure}; did you mean {near}?" if near else cure)
    elif node.kind == "string":
        pattern = schema.get("pattern")
        if len(value) < schema.get("minLength", 0):
            report.error(node, path, "is an empty string", "write a value, or remove the key")
        elif len(value) > schema.get("maxLength", len(value)):
            report.error(
                node, path, f"has {len(value)} characters", f"at most {schema['maxLength']} are allowed"
            )
        elif pattern and not re.search(pattern, value):
            report.error(node, path, f"is {shown(node)}", schema.get("x-says", f"must match {pattern}"))
    elif node.kind in ("integer", "number"):
        for bound, holds, says in BOUNDS:
            if bound in schema and not holds(value, schema[bound]):
                report.error(node, path, f"is {shown(node)}", f"must be {says} {schema[bound]}")
                return
