"""What is left of a request once it has ended, for logs, meters and traces: what it was, how it went, where its time went."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

request_logger = logging.getLogger("fmray.requests")

MOST_STAGES = 64
"""Of one request; one of thousands of inputs is told by its first batches."""

StageName = Literal["prepare", "queue", "infer", "answer"]


class Stage(NamedTuple):
    """A part of a request's time. `Stage("infer", 17.031, 17.062, "fmray-clip")`, by `time.perf_counter`."""

    name: StageName
    began: float
    ended: float
    model: str | None = None


_stages: ContextVar[list[Stage] | None] = ContextVar("fmray_stages", default=None)


def begin_stages() -> list[Stage]:
    """From here on, what this request's tasks note goes into this list."""
    stages: list[Stage] = []
    _stages.set(stages)
    return stages


def note_stage(name: StageName, began: float, ended: float, model: str | None = None) -> None:
    """Called in a request's own task. Items of one batch note the same stage: it counts once."""
    stages, stage = _stages.get(), Stage(name, began, ended, model)
    if stages is not None and len(stages) < MOST_STAGES and stage not in stages[-4:]:
        stages.append(stage)


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that has ended: nothing in it comes from the client but the id and the trace that he chose.

    `Finished("POST", "/v1/embeddings", 200, 0.012, "req_5f", "alice")`
    """

    method: str
    route: str
    """As it stands in the app (`/v1/models/{model_id}`), so that no path with a secret in it is kept; `-`: none."""
    status: int
    """499: the client left before there was one."""
    seconds: float
    request_id: str
    key_name: str
    """`-`: no key."""
    traceparent: str = ""
    """W3C's header as it came; whoever uses it checks it."""
    stages: tuple[Stage, ...] = ()
    """In the order in which they were noted."""


def log_finished(request: Finished) -> None:
    """`Border(finished=log_finished)`: one line for a request, without prompt, picture, key or path."""
    if not request_logger.hasHandlers():  # a replica of Ray Serve: its standard error is its log
        request_logger.addHandler(logging.StreamHandler())
    request_logger.setLevel(logging.INFO)
    request_logger.info(
        "%s %s %d %.1f ms %s key=%s",
        request.method,
        request.route,
        request.status,
        request.seconds * 1000,
        request.request_id,
        request.key_name,
    )
