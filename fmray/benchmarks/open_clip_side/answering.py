"""A process that answers questions: a line of JSON in, a line of JSON out. Shared by both sides; imports nothing of theirs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer_questions(answers: Mapping[str, Callable[..., Any]]) -> None:
    """Until standard input ends: `{"ask": "steps", "count": 3}` calls `answers["steps"](count=3)` and writes its result.

    What libraries print goes to standard error, so that standard output holds answers alone.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            question = json.loads(line)
            result = answers[question.pop("ask")](**question)
            out.write(json.dumps(result) + "\n")
            out.flush()
