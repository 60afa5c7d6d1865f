"""One pool over Ray actors: requests to free replicas, again to another one where a replica died. Imports ray; knows no room."""

from __future__ import annotations

import logging
import math
import os
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from textwrap import shorten
from threading import Lock
from typing import Any, Generic, TypeVar

import ray
import ray.exceptions

from fmray.config.pools import PoolConfig
from fmray.config.schema import RuntimeConfig
from fmray.errors import ConfigError, PoolError
from fmray.runtime.context import choose_device, prepare_process
from fmray.runtime.pool import Place, RoleSpec
from fmray.runtime.ray_tensors import carry_tensors
from fmray.runtime.ray_weights import RayWeightStore, last_line

log = logging.getLogger(__name__)

A = TypeVar("A")
T = TypeVar("T")
Method = Callable[[Any, Any], Any]

DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
)
"""What Ray raises of an answer whose replica, or whose node, is gone: the request may be asked again."""
UNSENDABLE = (TypeError, ValueError, AttributeError, pickle.PicklingError, ray.exceptions.RayError)
"""What Ray raises of a request that it cannot pickle or store."""


# ------------------------------------------------------------------------------------------------------------ in the actor


class Replica:
    """The actor. Its role is built by the first who asks, so that what goes wrong in building is told as an answer is."""

    _name = "replica"  # until __init__ is done, and where it cannot be

    def __init__(self, spec: RoleSpec, index: int, store: RayWeightStore) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        prepare_process(RuntimeConfig(threads=spec.pool.threads or math.ceil(spec.pool.cpus)))
        carry_tensors()
        self._spec, self._name = spec, f"{spec.name}[{index}]"
        self._place = Place(choose_device("auto" if spec.pool.gpus else "cpu"), store)

    def __repr__(self) -> str:
        return self._name  # in Ray's dashboard and logs

    @cached_property
    def role(self) -> Any:
        return self._spec.build(self._spec.configuration, self._place)

    def ask(self, method: Method | None, request: Any) -> Any:
        """The role's answer; no method: build the role, if it is not there yet."""
        role = self.role
        return None if method is None else method(role, request)


def create_replicas(spec: RoleSpec, store: RayWeightStore) -> tuple[Any, ...]:
    """The pool's actors, being started; they live as long as the driver, or until they are killed.

    Raises ConfigError for amounts or labels that Ray does not take.
    """
    config = spec.pool
    try:
        actor = ray.remote(
            Replica
        ).options(
            num_cpus=config.cpus,
            num_gpus=config.gpus,
            resources=dict(config.resources),
            label_selector=dict(config.labels),
            scheduling_strategy=config.strategy.upper(),
            max_restarts=config.max_restarts,
            max_task_retries=0,  # a request is asked again of another replica, not of the one that it may have killed
        )
        return tuple(actor.remote(spec, index, store) for index in range(config.replicas))
    except ValueError as error:
        raise ConfigError(f"pool {spec.name}", config.model_dump(exclude_defaults=True), str(error)) from None


# ----------------------------------------------------------------------------------------------------------- in the client


class ReplicaLost(PoolError):
    """A replica whose restarts are used up was to be asked."""


@dataclass(eq=False, slots=True)
class Asked(Generic[A]):
    """A request on its way: `Answer` of a RayPool."""

    pool: RayPool
    method: Method | None
    """None: only be there, built."""
    request: Any
    phase: str
    pinned: int | None = None
    """The replica that has to answer; None: any."""
    replica: int | None = None
    """Who was asked last."""
    abandoned: bool = False
    outcome: Future[A] = field(default_factory=Future)

    def result(self) -> A:
        limit = self.pool.config.timeout_seconds
        return self.within(limit, f"no answer in {limit:g} s (timeout_seconds)")

    def within(self, seconds: float, complaint: str) -> A:
        wait([self.outcome], timeout=max(0.0, seconds))
        if not self.outcome.done():
            self.abandoned = True  # so that it is not asked again
            raise self.pool.error(self, complaint + self.pool.state())
        return self.outcome.result()


class RayPool:
    """`Pool` of actors, as one client asks them.

    A replica has one request of this client at a time and the others wait here, so that the next free replica takes the next one.
    Requests are sent by whoever calls; a thread of the pool's own takes the answers in.
    """

    def __init__(self, name: str, config: PoolConfig, actors: Sequence[Any], first: int = 0) -> None:
        """`first`: the replica to ask first; clients that differ in it do not all start with the same one."""
        self.name, self.config, self._actors = name, config, list(actors)
        self._order = deque(range(len(actors)))
        self._order.rotate(-first)
        self._lock = Lock()
        self._waiting: deque[Asked[Any]] = deque()
        self._busy: set[int] = set()
        self._away: dict[int, list[Asked[Any]]] = {}  # being rebuilt, and the requests pinned to them
        self._lost: dict[int, str] = {}
        self._broken: BaseException | None = None
        self._taker = ThreadPoolExecutor(1, f"pool {name}")

    def submit(self, method: Callable[[Any, T], A], request: T, *, phase: str) -> Asked[A]:
        asked = Asked[A](self, method, request, phase)
        with self._lock:
            self._waiting.append(asked)
            self._send()
        return asked

    def broadcast(self, method: Callable[[Any, T], A], value: T, *, phase: str) -> list[A]:
        """The answers, in the order of replicas; one whose restarts are used up has none, PoolError where all are."""
        answers, gone = list[A](), None
        for asked in self._ask_all(method, value, phase):
            try:
                answers.append(asked.result())
            except ReplicaLost as error:
                gone = error
        if gone is not None and not answers:
            raise gone
        return answers

    def build(self) -> list[Asked[None]]:
        """Have every replica build its role."""
        return self._ask_all(None, None, "start")

    def _ask_all(self, method: Method | None, value: Any, phase: str) -> list[Asked[Any]]:
        """One request per replica, each pinned to its own."""
        everyone = [
            Asked[Any](self, method, value, phase, pinned=index) for index in range(len(self._actors))
        ]
        with self._lock:
            for asked in everyone:
                self._send_pinned(asked)
        return everyone

    def error(self, asked: Asked[Any], complaint: str) -> PoolError:
        return PoolError(f"pool {self.name}, {_who(asked)}, phase {asked.phase}: {complaint}")

    def state(self) -> str:
        """Which replicas are not there, for an error."""
        with self._lock:
            away, lost = sorted(self._away), sorted(self._lost)
        text = f"; of {len(self._actors)} replicas"
        text += f", being rebuilt: {away}" if away else ""
        text += f", lost for good: {lost}" if lost else ""
        return text if away or lost else ""

    # The rest holds the lock, but for what the taker calls: _take, _rebuilt, _checked.

    def _send(self) -> None:
        """Waiting requests to free replicas, the one longest free first."""
        while self._waiting and (why := self._hopeless()):
            asked = self._waiting.popleft()
            asked.outcome.set_exception(self._broken or self.error(asked, why))
        while self._waiting and (replica := self._free()) is not None:
            self._ask(self._waiting.popleft(), replica)

    def _send_pinned(self, asked: Asked[Any]) -> None:
        replica = asked.pinned
        assert replica is not None
        asked.replica = replica
        if self._broken is not None:
            asked.outcome.set_exception(self._broken)
        elif replica in self._lost:
            asked.outcome.set_exception(ReplicaLost(str(self.error(asked, self._lost[replica]))))
        elif replica in self._away:
            self._away[replica].append(asked)
        else:
            self._ask(asked, replica)

    def _hopeless(self) -> str:
        if self._broken is not None:
            return str(self._broken)
        lost = len(self._lost) == len(self._actors)
        return "no replica is left: " + "; ".join(self._lost.values()) if lost else ""

    def _free(self) -> int | None:
        for replica in self._order:
            if replica not in self._busy and replica not in self._away and replica not in self._lost:
                self._order.remove(replica)
                self._order.append(replica)
                return replica
        return None

    def _ask(self, asked: Asked[Any], replica: int) -> None:
        asked.replica = replica
        try:
            reference = self._actors[replica].ask.remote(asked.method, asked.request)
        except UNSENDABLE as error:
            asked.outcome.set_exception(error)
            return
        if asked.pinned is None:
            self._busy.add(replica)
        self._when_done(reference, self._take, asked, replica)

    def _when_done(self, reference: Any, take: Callable[..., None], *about: Any) -> None:
        """Let the taker have it: the thread in which Ray tells of an answer must not call Ray."""

        def pass_on(done: Future[Any]) -> None:
            self._taker.submit(take, *about, done).add_done_callback(self._checked)

        reference.future().add_done_callback(pass_on)

    def _take(self, asked: Asked[Any], replica: int, done: Future[Any]) -> None:
        error = done.exception()
        with self._lock:
            if asked.pinned is None:
                self._busy.discard(replica)
            if error is None:
                asked.outcome.set_result(done.result())
            elif not isinstance(error, DEATHS):
                asked.outcome.set_exception(self._original(asked, error))
            else:
                self._rebuild(replica)
                if asked.pinned is not None:
                    self._send_pinned(asked)
                elif not asked.abandoned:
                    self._waiting.appendleft(asked)
            self._send()

    def _rebuild(self, replica: int) -> None:
        """Ray restarts the actor by itself; this builds its role, and tells when it is there."""
        if replica in self._away or replica in self._lost:
            return
        log.warning("pool %s: replica %d died; it is being rebuilt", self.name, replica)
        self._away[replica] = []
        again = self._actors[replica].ask.options(max_task_retries=-1)
        self._when_done(again.remote(None, None), self._rebuilt, replica)

    def _rebuilt(self, replica: int, done: Future[Any]) -> None:
        error = done.exception()
        with self._lock:
            pinned = self._away.pop(replica)
            if isinstance(error, ray.exceptions.ActorDiedError):
                why = shorten(last_line(error), 120, placeholder=" …")
                self._lost[replica] = (
                    f"replica {replica} died, max_restarts={self.config.max_restarts}: {why}"
                )
                log.warning("pool %s: %s", self.name, self._lost[replica])
            elif isinstance(error, DEATHS):
                self._rebuild(replica)
            elif error is not None:
                asked = Asked[Any](self, None, None, "rebuild", replica=replica)
                self._broken = self._original(asked, error)
            for asked in pinned:
                self._send_pinned(asked)
            self._send()

    def _original(self, asked: Asked[Any], error: BaseException) -> BaseException:
        """What the role raised, as it raised it; its traceback there goes along as a note."""
        cause = getattr(error, "cause", None)
        if not isinstance(cause, Exception) or isinstance(cause, ray.exceptions.RayError):
            return self.error(asked, shorten(last_line(error), 400, placeholder=" …"))
        cause.add_note(f"in pool {self.name}, {_who(asked)}, phase {asked.phase}:\n{error}")
        return cause

    def _checked(self, taken: Future[None]) -> None:
        """The taker itself failed: nobody waits for ever."""
        error = taken.exception()
        if error is not None:
            with self._lock:
                self._broken = error
                self._send()


def _who(asked: Asked[Any]) -> str:
    return "no replica yet" if asked.replica is None else f"replica {asked.replica}"
