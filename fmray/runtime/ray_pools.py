"""All pools of a run on Ray: made by the driver, asked by every rank. Imports ray; knows no room.

The actors and the weights belong to the driver, so they outlive a learner that dies. Ranks get `PoolHandles` and make clients of
their own of it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray
import torch

from fmray.config.pools import PoolConfig
from fmray.runtime.pool import Answer, LocalPools, Pool, PoolPlan, Pools
from fmray.runtime.ray_pool import Asked, RayPool, create_replicas
from fmray.runtime.ray_tensors import carry_tensors
from fmray.runtime.ray_weights import RayWeightStore
from fmray.runtime.weights import WeightStore

A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolHandles:
    """The running pools, as they travel to the ranks."""

    plan: PoolPlan
    store: RayWeightStore | None = None
    """None: the plan has no roles."""
    actors: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Ray's actor handles by pool; pools with replicas=0 have none."""

    def client(self, device: torch.device, rank: int = 0, world_size: int = 1) -> Pools:
        """One process's pools; `device` is for the roles that it holds itself (replicas=0)."""
        if self.store is None:
            return LocalPools(self.plan, device)
        return RayPools(self, self.store, device, rank / world_size)


class RayPools:
    """`Pools` of one client."""

    def __init__(
        self, handles: PoolHandles, store: RayWeightStore, device: torch.device, start: float
    ) -> None:
        """`start`: where in each pool to begin, as a share of its replicas in [0, 1): ranks begin apart."""
        carry_tensors()
        self.weights: WeightStore = store
        configs = {spec.name: spec.pool for spec in handles.plan.roles}
        self._own = LocalPools(handles.plan, device, store)
        self._pools: dict[str, Pool] = {
            name: RayPool(name, configs[name], actors, int(start * len(actors)))
            for name, actors in handles.actors.items()
        }

    def __getitem__(self, name: str) -> Pool:
        if name not in self._pools:
            self._pools[name] = _OwnPool(self._own[name])
        return self._pools[name]

    def share(self, value: T) -> T:
        stand_in: T = ray.put(value)
        return stand_in


@dataclass(frozen=True, slots=True)
class _OwnPool:
    """A role that this process holds itself, asked with shared values too."""

    pool: Pool

    @property
    def name(self) -> str:
        return self.pool.name

    def submit(self, method: Callable[[Any, T], A], request: T, *, phase: str) -> Answer[A]:
        return self.pool.submit(method, _value(request), phase=phase)

    def broadcast(self, method: Callable[[Any, T], A], value: T, *, phase: str) -> list[A]:
        return self.pool.broadcast(method, _value(value), phase=phase)


def _value(request: T) -> T:
    value: T = ray.get(request) if isinstance(request, ray.ObjectRef) else request
    return value


# ---------------------------------------------------------------------------------------------------------- on the driver


def pool_resources(plan: PoolPlan) -> dict[str, float]:
    """What all pools take together: `{"CPU": 6.0, "GPU": 1.5}`."""
    total: Counter[str] = Counter()
    for spec in plan.roles:
        each = {"CPU": spec.pool.cpus, "GPU": spec.pool.gpus, **spec.pool.resources}
        for name, amount in each.items():
            total[name] += spec.pool.replicas * amount  # type: ignore[assignment]
    return {name: amount for name, amount in total.items() if amount}


@contextmanager
def running_pools(plan: PoolPlan) -> Iterator[PoolHandles]:
    """Inside, the pools and the store are there and ready; afterwards they are gone, whatever happened.

    Raises what building a role raised, or PoolError naming the replica that was not ready in time.
    """
    if not plan.roles:
        yield PoolHandles(plan)
        return
    with ExitStack() as stack:
        carry_tensors()
        store = RayWeightStore(plan.keep_versions, max(spec.pool.timeout_seconds for spec in plan.roles))
        stack.callback(store.close)
        actors: dict[str, tuple[Any, ...]] = {}
        for spec in plan.roles:
            if spec.pool.replicas:
                actors[spec.name] = create_replicas(spec, store)
                for actor in actors[spec.name]:
                    stack.callback(ray.kill, actor)
        handles = PoolHandles(plan, store, actors)
        _wait_until_ready(handles)
        yield handles


def _wait_until_ready(handles: PoolHandles) -> None:
    """All pools build at once; the first error ends the wait."""
    began = time.monotonic()
    asked: list[tuple[float, Asked[None]]] = []
    for spec in handles.plan.roles:
        pool = RayPool(spec.name, spec.pool, handles.actors.get(spec.name, ()))
        asked += [(spec.pool.start_timeout_seconds, one) for one in pool.build()]
    for limit in sorted({limit for limit, _ in asked}):
        left = began + limit - time.monotonic()
        done, _ = wait([one.outcome for _, one in asked], max(0.0, left), FIRST_EXCEPTION)
        for outcome in done:
            outcome.result()
        for each, one in asked:
            if each == limit:
                one.within(
                    0.0, f"not ready in {limit:g} s (start_timeout_seconds): {_needs(one.pool.config)}"
                )


def _needs(config: PoolConfig) -> str:
    """What a replica that is still missing may be waiting for."""
    free = ray.available_resources()
    each = {"CPU": config.cpus, "GPU": config.gpus, **config.resources}
    needs = [f"{amount:g} {name} of {free.get(name, 0):g} free" for name, amount in each.items() if amount]
    needs += [f"a node with {key}={value}" for key, value in config.labels.items()]
    return "it is still building, or waits for " + ", ".join(needs)
