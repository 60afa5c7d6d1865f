"""Parts through Ray Data, without a model: processes that import nothing heavy."""

from __future__ import annotations

from typing import Any

import pytest

from fmray.config.base import RuntimeConfig
from fmray.errors import CheckpointError, DataError
from fmray.runtime.ray_data import mapped_on_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def failing() -> Any:
    raise CheckpointError("the model cannot be loaded here")


def letters(source: str, part: int) -> bytes:
    return source[part].encode()


def refusing() -> Any:
    def work(content: bytes) -> bytes:
        if not content.strip():
            raise DataError("part of no letter")
        return content

    return work


def shouting() -> Any:
    return lambda content: content.upper()


def test_parts_come_back_with_their_numbers_and_errors_as_they_were_raised(ray_session: None) -> None:
    runtime = RuntimeConfig(kind="ray")
    made = dict(mapped_on_ray([0, 2, 3], letters, "abcd", shouting, runtime))
    assert made == {0: b"A", 2: b"C", 3: b"D"}
    with pytest.raises(CheckpointError, match=r"^the model cannot be loaded here$"):
        list(mapped_on_ray([0], letters, "abcd", failing, runtime))
    with pytest.raises(DataError, match=r"^part of no letter$"):
        list(mapped_on_ray([0, 1], letters, "a ", refusing, runtime))
