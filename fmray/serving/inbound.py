"""What a route knows of the request that it answers, beside its body: its time, and where times are noted for the border."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from fmray.serving.batcher import Answered


def deadline_of(request: Request) -> float | None:
    """The event loop's time at which nobody waits for the answer any more; None: nobody has said."""
    deadline: float | None = request.scope["state"].get("deadline")
    return deadline


def note_times(request: Request, *answered: Answered[Any]) -> None:
    """For the border's headers: the longest wait and the longest forward pass of what was asked."""
    state = request.scope["state"]
    for each in answered:
        state["queue_seconds"] = max(state.get("queue_seconds", 0.0), each.queue_seconds)
        state["infer_seconds"] = max(state.get("infer_seconds", 0.0), each.infer_seconds)
