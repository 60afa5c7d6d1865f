"""How many replicas a role has, and what each of them takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fmray.config.base import Section


class PoolConfig(Section):
    """An actor pool: replicas of one role (rollout policy, reference, a reward), each an actor of its own.

    In local mode every pool is one object in the same process, and these keys are not read.
    """

    replicas: Annotated[int, Field(ge=0)] = 1
    """Actors; 0: none, each learner holds the role itself (rules and other light scorers)."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that Ray reserves for each replica."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that Ray reserves for each replica; fractions share one."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Torch threads of each replica; None: `cpus` rounded up."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources of the nodes that may hold a replica, with the amount each takes."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that may hold a replica (`{"market-type": "spot"}`)."""
    strategy: Literal["default", "spread"] = "default"
    """`spread`: over as many nodes as there are."""
    max_restarts: Annotated[int, Field(ge=-1)] = 3
    """How often a replica that died is built again, with the current weights; -1: without end."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest wait for one answer, the time to rebuild a replica included."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Longest wait until a new replica is ready."""
