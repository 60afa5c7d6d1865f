"""A process that answers questions: a line of JSON in, a line of JSON out. Shared by both sides; imports nothing of theirs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def conversation() -> Iterator[tuple[Iterator[dict[str, Any]], Callable[[Any], None]]]:
    """The questions, as they come, until standard input ends; and what to answer with.

    What libraries print goes to standard error, so that standard output holds answers alone.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def answer(result: Any) -> None:
            out.write(json.dumps(result) + "\n")
            out.flush()

        yield map(json.loads, sys.stdin), answer


def answer_questions(answers: Mapping[str, Callable[..., Any]]) -> None:
    """Until standard input ends: `{"ask": "steps", "count": 3}` calls `answers["steps"](count=3)` and writes its result."""
    with conversation() as (questions, answer):
        for question in questions:
            answer(answers[question.pop("ask")](**question))
