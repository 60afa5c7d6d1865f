"""One endpoint's rate limits over all its replicas: an actor counts, and leases, so that few requests ask it. Imports ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions

from fmray.runtime.windows import Grant, Windows

log = logging.getLogger(__name__)

LEASE = 0.5
"""Seconds in which a replica may spend what it was granted; what is left then is lost to that minute."""
STARTING = 30.0
"""Seconds that a replica waits for the actor to be made; a request waits for as long as a lease lasts."""
ALONE = 5.0
"""Seconds for which a replica counts alone after the actor did not answer in time."""
IDLE = 600.0
"""Seconds without a question after which the actor ends: it has long forgotten every minute by then."""
NAMESPACE = "fmray-limits"
ON_HEAD = {"node:__internal_head__": 0.001}
"""The actor's place: on a worker's node it would keep the node from leaving when its last replica does."""
LOST = (ray.exceptions.RayError, TimeoutError, ValueError)
"""What a call raises whose actor is dead, unreachable, or cannot be found or made (ValueError)."""


NOTHING = Grant(0, 0, 0.0, 0.0)


class LimitActor:
    """The actor: one thread, one event loop, so that two questions never interleave within `take`."""

    def __init__(self, idle: float = IDLE) -> None:
        self._windows, self._idle = Windows(lease=2 * LEASE), idle  # a lease, and the question for more
        self._asked = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def take(
        self, name: str, limit: int, need: int, want: int, back: Sequence[tuple[int, int]] = ()
    ) -> Grant:
        """As `Windows.take`, by this actor's clock: replicas' clocks do not matter."""
        self._asked = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_when_idle())
        return self._windows.take(name, limit, need, want, self._asked, back)

    async def _end_when_idle(self) -> None:
        """It is detached from whoever made it, for replicas come and go; so it has to end by itself."""
        while time.monotonic() - self._asked < self._idle:
            await asyncio.sleep(self._idle / 10)
        ray.kill(ray.get_runtime_context().current_actor)


@dataclass(slots=True)
class _Lease:
    """What a replica may still admit of one name."""

    lock: asyncio.Lock
    parts: deque[list[float]] = field(default_factory=deque)
    """Grants: when each ends by this process's monotonic clock, how much of it is left, its slot in the actor. The end is
    counted from before the question was sent, so it never comes too late."""
    back: list[tuple[int, int]] = field(default_factory=list)
    """What ended unspent, to be given back with the next question."""
    used: int = 0
    """Spent since the last question."""
    known: Grant = field(default=NOTHING)
    """The actor's last answer."""
    refused: tuple[int, float, Grant] = (0, 0.0, NOTHING)
    """How much was refused last, until when that is not asked again, and the answer: who hammers costs the actor nothing."""

    @property
    def left(self) -> int:
        return int(sum(part[1] for part in self.parts))

    def expire(self, now: float) -> None:
        """Put aside what has ended."""
        while self.parts and self.parts[0][0] <= now:
            _, left, slot = self.parts.popleft()
            if left:
                self.back.append((int(slot), int(left)))

    def spend(self, need: int) -> None:
        """The part first that ends first."""
        self.used += need
        while need:
            taken = min(need, self.parts[0][1])
            self.parts[0][1] -= taken
            need -= int(taken)
            if not self.parts[0][1]:
                self.parts.popleft()


class RayLedger:
    """Counts with all replicas of an endpoint: at most the limit in any 60 seconds, for all of them together.

    Where the actor cannot be asked, the replica counts alone with the whole limit, and says so once: an endpoint that
    answers is worth more than an exact count. With R replicas at most R limits a minute pass then, and at most one more
    limit after an actor was lost, since the new one knows nothing.
    """

    def __init__(self, app: str, *, idle: float = IDLE) -> None:
        self._name, self._idle = f"{app}-limits", idle
        self._leases: dict[str, _Lease] = {}
        self._own = Windows()
        self._alone_until = 0.0
        self._actor: Any = None

    async def start(self) -> None:
        """Have the actor made and wait until it answers, so that the first request does not; may be left out."""
        lease = _Lease(asyncio.Lock())
        await self._ask(lease, "", 1, 0, patience=STARTING)

    async def take(self, name: str, limit: int, need: int) -> Grant:
        """`need` admissions of `name` or none."""
        lease = self._leases.setdefault(name, _Lease(asyncio.Lock()))
        async with lease.lock:
            now = time.monotonic()
            lease.expire(now)
            if lease.left < need:
                if now < self._alone_until:
                    return self._own.take(name, limit, need, need, now)
                least, until, refusal = lease.refused
                if now < until and need >= least:
                    return refusal
                answer = await self._ask(lease, name, limit, need)
                if answer is None:
                    return self._own.take(name, limit, need, need, now)
                if not answer.granted:
                    lease.refused = need, now + min(answer.wait, LEASE), answer
                    return answer
            lease.spend(need)
            self._tidy(now)
            known = lease.known
            return Grant(need, known.left + lease.left, 0.0, known.reset)

    async def _ask(
        self, lease: _Lease, name: str, limit: int, need: int, patience: float = LEASE
    ) -> Grant | None:
        """More for a lease: as much as the last one was good for, twice that where it did not last."""
        missing = max(0, need - lease.left)
        block = lease.used if lease.back or not lease.known.granted else 2 * lease.used
        want = max(missing, min(block, limit // 16))
        back, asked = tuple(lease.back), time.monotonic()
        try:
            async with asyncio.timeout(patience):  # as long as a lease: what comes later may not be spent
                actor = self._actor or await asyncio.get_running_loop().run_in_executor(None, self._found)
                grant: Grant = await actor.take.remote(name, limit, missing, want, back)
        except LOST as error:
            self._count_alone(asked, error)
            return None
        if self._alone_until:
            log.warning("rate limits are counted over all replicas again")
            self._alone_until = 0.0
        lease.back, lease.used, lease.known = [], 0, grant
        if grant.granted:
            lease.parts.append([asked + LEASE, grant.granted, grant.slot])
        return grant

    def _count_alone(self, asked: float, error: Exception) -> None:
        """For a while; a dead actor is made again by the next question, a slow one is left in peace for longer."""
        if not self._alone_until:
            log.warning("rate limits are counted by each replica alone: %s", type(error).__name__)
        if not isinstance(error, TimeoutError):
            self._actor = None
        self._alone_until = asked + (ALONE if isinstance(error, TimeoutError) else LEASE)

    def _found(self) -> Any:
        """The actor, made if it is not there. Every replica may do so: the name decides who comes first."""
        self._actor = (
            ray.remote(LimitActor)
            .options(
                name=self._name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                resources=ON_HEAD,
                max_concurrency=1000,
            )
            .remote(self._idle)
        )
        return self._actor

    def _tidy(self, now: float) -> None:
        """Forget names whose leases have ended, once they are many."""
        if len(self._leases) > 10_000:
            for name, lease in list(self._leases.items()):
                if not lease.lock.locked() and all(part[0] <= now for part in lease.parts):
                    del self._leases[name]


def end(app: str) -> None:
    """End the actor of an endpoint that is taken down; nothing where there is none."""
    try:
        ray.kill(ray.get_actor(f"{app}-limits", namespace=NAMESPACE))
    except ValueError:  # what Ray raises where no actor has the name
        return
