"""What a check says: one line for each mistake, with its place, its key, and a cure."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from fmray.checks.marked import Node, Place, Slip


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake. `str()` is the line that is printed.

    `Finding("a.yaml", 12, 7, "error", "spec.minReplica", "unknown key", "did you mean minReplicas?")` prints
    `a.yaml:12:7: error: spec.minReplica: unknown key; did you mean minReplicas?`
    """

    file: str
    line: int
    column: int
    severity: Literal["error", "warning"]
    key: str
    problem: str
    cure: str

    def __str__(self) -> str:
        where = f"{self.key}: " if self.key else ""
        return f"{self.file}:{self.line}:{self.column}: {self.severity}: {where}{self.problem}; {self.cure}"

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


class Report:
    """Collects the findings of one file."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.findings: list[Finding] = []

    def error(self, where: Node | Place, key: str, problem: str, cure: str) -> None:
        """Something that does not deploy, or does not do what it says."""
        self._add("error", where, key, problem, cure)

    def warning(self, where: Node | Place, key: str, problem: str, cure: str) -> None:
        """Something that still works, but not for long; it does not change the exit status."""
        self._add("warning", where, key, problem, cure)

    def slips(self, slips: Iterable[Slip], prefix: str = "") -> None:
        """What is wrong with the YAML itself."""
        for slip in slips:
            self.error(slip.place, joined(prefix, slip.key) if slip.key else prefix, slip.problem, slip.cure)

    def scratch(self) -> Report:
        """An empty report of the same file, for trying one of several readings."""
        return Report(self.file)

    def mark(self) -> int:
        """How many errors there are so far."""
        return sum(finding.severity == "error" for finding in self.findings)

    def _add(
        self, severity: Literal["error", "warning"], where: Node | Place, key: str, problem: str, cure: str
    ) -> None:
        place = where.place if isinstance(where, Node) else where
        one_line = [" ".join(text.split()) for text in (problem, cure)]
        self.findings.append(Finding(self.file, place.line, place.column, severity, key, *one_line))


def joined(path: str, key: str) -> str:
    """A key below a path: `spec.replicas`, `limits["nvidia.com/gpu"]`."""
    if not re.fullmatch(r"[\w-]+([.\[].*)?", key):
        return f"{path}[{json.dumps(key, ensure_ascii=False)}]"
    return f"{path}.{key}" if path else key


def shown(node: Node) -> str:
    """A value as a reader of the file knows it, cut short: `the string "8"`, `8`, `a list of 3`."""
    if node.kind == "mapping":
        return "a mapping" + ("" if node.entries else " without keys")
    if node.kind == "list":
        return f"a list of {len(node.items)}"
    if node.kind == "null":
        return "empty"
    text = json.dumps(node.value, default=str, ensure_ascii=False)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"the string {text}" if node.kind == "string" else text


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that is nearest in spelling; None: none is near. See `nearest`."""
    return next(iter(nearest(word, known, cutoff)), None)


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The known words that are nearest in spelling, all that are equally near; capitals and `_-` do not count."""
    return [*_nearest(word, tuple(sorted({*known})), cutoff)]


@lru_cache(4096)
def _nearest(word: str, known: tuple[str, ...], cutoff: float) -> tuple[str, ...]:
    ranked: dict[float, list[str]] = {}
    match = difflib.SequenceMatcher(
        b=_bare(word)
    )  # what is compared with many others is b: it is prepared once
    for name in known:
        match.set_seq1(_bare(name))
        if match.real_quick_ratio() >= cutoff and match.quick_ratio() >= cutoff:
            ratio = match.ratio()
            if ratio >= cutoff:
                ranked.setdefault(ratio, []).append(name)
    return tuple(ranked[max(ranked)]) if ranked else ()


def _bare(word: str) -> str:
    return re.sub(r"[_\-]", "", word).lower()


def did_you_mean(word: str, known: Sequence[str], what: str = "there are") -> str:
    """A cure for a name that does not exist: the nearest one, else all."""
    near = nearest(word, known)
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    return f"{what}: {', '.join(sorted(known))}" if known else "remove it"
