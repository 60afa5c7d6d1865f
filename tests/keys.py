"""Nested keys of a test's configuration, changed by paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_keys(config: dict[str, Any], changes: Mapping[str, Any], separator: str) -> dict[str, Any]:
    """A copy with `{"train.steps": 3}` laid over it; sections that are not there are made."""
    for path, value in changes.items():
        config = _with(config, path.split(separator), value)
    return config


def _with(config: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    inner = _with(config.get(path[0], {}), path[1:], value) if len(path) > 1 else value
    return {**config, path[0]: inner}
