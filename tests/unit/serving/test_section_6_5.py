"""The table of faults and bad inputs (`section_6_5`) names only tests that there are, and cases that they have."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.unit.serving.section_6_5 import GROUPS, OPEN

TESTS = Path(__file__).parents[2]
NAMED = re.compile(r"(?P<file>[\w/]+\.py)::(?P<test>test_\w+)(\[(?P<case>.+)\])?")


@cache
def parsed(file: str) -> tuple[frozenset[str], frozenset[str]]:
    """A file's test functions, and every word that it holds: strings and names of functions."""
    path = TESTS / file if "/" in file else Path(__file__).parent / file
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(functions), frozenset(strings | functions)


@pytest.mark.parametrize("group", GROUPS)
def test_every_line_has_a_test_that_there_is(group: str) -> None:
    for line, name in GROUPS[group].items():
        found = NAMED.fullmatch(name)
        assert found, f"{line}: {name}"
        functions, words = parsed(found["file"])
        assert found["test"] in functions, f"{line}: {name}"
        assert found["case"] is None or found["case"] in words, f"{line}: {name}"


def test_every_group_is_whole() -> None:
    """As many lines as the specification has, or more."""
    least = {"images": 31, "encoding": 10, "url": 25, "text": 16, "protocol": 22, "load": 5, "process": 10}
    assert {group: len(lines) for group, lines in GROUPS.items() if len(lines) < least[group]} == {}
    assert all(reason for reason in OPEN.values())
