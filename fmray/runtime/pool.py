"""Roles that the learners ask: one contract for an object in this process and for actors elsewhere.

A role is a plain class; a pool holds it on one or more replicas. `pool.submit(Policy.generate, request)` asks a free replica,
`pool.broadcast(Policy.load, version)` asks all. A role's answer is a pure function of (weight version, request), so a request
may be asked again of another replica, and which one answers changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from fmray.config.pools import PoolConfig
from fmray.runtime.weights import LocalWeightStore, WeightStore

A = TypeVar("A")
A_co = TypeVar("A_co", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a role finds itself: its device, and the store its weights come from."""

    device: torch.device
    weights: WeightStore


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """One pool to make: `RoleSpec("reward.sentiment", build_scorer, scorer_config, PoolConfig(replicas=2))`."""

    name: str
    build: Callable[[Any, Place], Any]
    """Module-level function (it is pickled by name): configuration and place in, the role's object out."""
    configuration: Any
    pool: PoolConfig


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The pools of a run: `PoolPlan((RoleSpec("rollout", …), RoleSpec("reference", …)), keep_versions=1)`."""

    roles: tuple[RoleSpec, ...] = ()
    keep_versions: int = 1
    """Versions of the weights that the store holds: the staleness allowed, and one."""


class Answer(Protocol[A_co]):
    """What a pool will have said."""

    def result(self) -> A_co:
        """Wait for it. Raises what the role raised, or PoolError naming pool, replica and phase."""
        ...


class Pool(Protocol):
    """Replicas of one role."""

    @property
    def name(self) -> str: ...

    def submit(self, method: Callable[[Any, T], A], request: T, *, phase: str) -> Answer[A]:
        """Ask the least loaded replica; asked again of another one if it dies. `phase` is for the error."""
        ...

    def broadcast(self, method: Callable[[Any, T], A], value: T, *, phase: str) -> list[A]:
        """Ask all replicas and wait; a replica that dies is asked again once it is rebuilt."""
        ...


class Pools(Protocol):
    """All pools of a run, as one rank sees them."""

    @property
    def weights(self) -> WeightStore: ...

    def __getitem__(self, name: str) -> Pool: ...

    def share(self, value: T) -> T:
        """A stand-in for a large value that several requests carry: it travels once. Pass it to `submit` as the request."""
        ...


@dataclass(frozen=True, slots=True)
class Ready(Generic[A]):
    """An answer that is already there."""

    value: A

    def result(self) -> A:
        return self.value


@dataclass(frozen=True, slots=True)
class LocalPool:
    """`Pool` of one object in this process."""

    name: str
    role: Any

    def submit(self, method: Callable[[Any, T], A], request: T, *, phase: str) -> Answer[A]:
        return Ready(method(self.role, request))

    def broadcast(self, method: Callable[[Any, T], A], value: T, *, phase: str) -> list[A]:
        return [method(self.role, value)]


class LocalPools:
    """`Pools` in this process; each role is built when it is first asked."""

    def __init__(self, plan: PoolPlan, device: torch.device, weights: WeightStore | None = None) -> None:
        self.weights = weights or LocalWeightStore(plan.keep_versions)
        self._roles = {role.name: role for role in plan.roles}
        self._place = Place(device, self.weights)
        self._made: dict[str, LocalPool] = {}

    def __getitem__(self, name: str) -> Pool:
        if name not in self._made:
            spec = self._roles[name]
            self._made[name] = LocalPool(name, spec.build(spec.configuration, self._place))
        return self._made[name]

    def share(self, value: T) -> T:
        return value
