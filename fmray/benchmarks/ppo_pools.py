"""What pools over Ray cost by themselves: asking many replicas, and bringing new weights to them."""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmray.benchmarks.peers import Measured
from fmray.benchmarks.ppo_bench import PpoBench
from fmray.benchmarks.sleeper import Sleeper
from fmray.benchmarks.table import Row
from fmray.benchmarks.watched_policy import WatchedPolicy
from fmray.config.pools import PoolConfig
from fmray.errors import ResourceError, require_package
from fmray.rlhf.learner import make_learner
from fmray.rlhf.publishing import publish, weight_buckets
from fmray.rlhf.records import RolloutRequest
from fmray.rlhf.roles import ROLLOUT
from fmray.runtime.context import WorkerContext, prepare_process
from fmray.runtime.pool import Pool, PoolPlan, Pools, RoleSpec
from fmray.runtime.run_folder import RunFolder
from fmray.runtime.weights import bucket_checksum

CPU = torch.device("cpu")
PROMPT = 48
"""Tokens of a prompt that travels."""
REPLICA_MIB = 230
"""What an actor that has imported torch keeps for itself (200 MiB measured), with a margin."""


@contextmanager
def _pools(plan: PoolPlan) -> Iterator[Pools]:
    """The pools on a Ray of this machine."""
    require_package("ray", "ray", "fmray benchmark ppo")
    from fmray.runtime.ray_cluster import connected
    from fmray.runtime.ray_pools import running_pools

    with connected(None), running_pools(plan) as handles:
        yield handles.client(CPU)


# --------------------------------------------------------------------------------------------------------------- dispatch


def dispatch(bench: PpoBench) -> list[Row]:
    """Requests with tokens and pixels to many replicas that sleep: what the wall clock has beyond the roles' own time."""
    sizes = bench.sizes
    _require_memory(sizes.replicas)
    pool = PoolConfig(replicas=sizes.replicas, cpus=0.01, threads=1, start_timeout_seconds=1800)
    plan = PoolPlan((RoleSpec("sleepers", Sleeper, sizes.new_tokens, pool),))
    requests = [_request(sizes.request, sizes.picture_side, number) for number in range(sizes.replicas)]
    overheads, shares = [], []
    started = time.monotonic()
    with _pools(plan) as pools:
        starting = time.monotonic() - started
        sleepers = pools["sleepers"]
        _ask(sleepers, requests, sizes.replicas, (0.05, 0.1))  # connections, code, memory
        count = sizes.replicas * sizes.requests_per_replica
        for _ in range(sizes.dispatch_repeats):
            wall, inside = _ask(sleepers, requests, count, sizes.sleep)
            ideal = greedy_schedule(inside, sizes.replicas)
            overheads.append(1000 * (wall - ideal) / (count * sizes.request))
            shares.append((wall, ideal))
    mine = Measured(tuple(overheads))
    carried = sum(len(ids) for ids in requests[0].prompt_ids) * 8 + _bytes_of(requests[0].pixels_BCHW)
    bench.notes.append(
        f"dispatch: {sizes.replicas} actors were ready after {starting:.0f} s; {count} requests of {sizes.request} samples, "
        f"{carried / 2**20:.2f} MiB each, pixels there and back; sleeps of {sizes.sleep[0]:g} to {sizes.sleep[1]:g} s. "
        "Ideal: the times inside the roles, each request given to the first free replica."
    )
    wall, ideal = (statistics.median(values) for values in zip(*shares, strict=True))
    return [
        Row(
            f"overhead outside the roles per sample, {sizes.replicas} Ray actors, {sizes.request} samples a request",
            mine.shown("ms"),
            f"wall {wall:.2f} s, ideal {ideal:.2f} s",
            mine.median,
            1.0,
            "lower",
        )
    ]


def _require_memory(replicas: int) -> None:
    """Raises ResourceError where the actors would not fit: Ray would end them one after the other."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return
    lines = meminfo.read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) // 1024 for line in lines if line.startswith("MemAvailable"))
    if free < replicas * REPLICA_MIB:
        needed = f"{replicas} actors take about {replicas * REPLICA_MIB} MiB, {free} MiB are free"
        raise ResourceError(f"benchmark ppo dispatch: {needed}; end other programs, or leave the part out")


def _request(samples: int, side: int, number: int) -> RolloutRequest:
    draw = torch.Generator().manual_seed(number)
    ids_BP = torch.randint(3, 30_000, (samples, PROMPT), generator=draw)
    return RolloutRequest(
        version=0,
        seed=number,
        sample_ids=tuple(range(number * samples, (number + 1) * samples)),
        prompts=tuple(range(number * samples, (number + 1) * samples)),
        prompt_ids=tuple(tuple(ids) for ids in ids_BP.tolist()),
        texts=tuple(f"prompt {number} {row}" for row in range(samples)),
        pixels_BCHW=torch.randint(0, 256, (samples, 3, side, side), generator=draw, dtype=torch.uint8),
    )


def _bytes_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _ask(
    pool: Pool, requests: Sequence[RolloutRequest], count: int, sleep: tuple[float, float]
) -> tuple[float, list[float]]:
    """Ask `count` requests at once and read all answers: seconds of it all, and inside the role for each."""
    sleeps = torch.empty(count).uniform_(*sleep, generator=torch.Generator().manual_seed(count)).tolist()
    inside = []
    started = time.perf_counter()
    answers = [
        pool.submit(Sleeper.answer, (requests[number % len(requests)], seconds), phase="act")
        for number, seconds in enumerate(sleeps)
    ]
    answers.reverse()
    while answers:  # read in order and let go: the pixels of all answers would be a gigabyte
        rollouts, seconds = answers.pop().result()
        assert rollouts.pixels_BCHW is not None
        inside.append(seconds)
    return time.perf_counter() - started, inside


def greedy_schedule(seconds: Sequence[float], replicas: int) -> float:
    """When the last one ends if each, in order, goes to the replica that is free first. `greedy_schedule([1, 1, 1], 2)` is 2."""
    free = [0.0] * replicas
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


# ---------------------------------------------------------------------------------------------------------------- publish


@dataclass(frozen=True, slots=True)
class Delivery:
    """One version's way to the replicas, in seconds from the beginning of publishing."""

    bytes: int
    verified: float
    """The last replica has copied the weights and compared checksums."""
    ready: float
    """It has packed its matrices anew: it could answer."""
    checksums: float
    """The learner's and the slowest replica's, measured by themselves, as if nothing of them overlapped with copying."""
    copy: float
    """As many bytes from one buffer to another, with the run's threads."""

    @property
    def speed(self) -> float:
        return self.bytes / self.verified / 1e9

    @property
    def copy_speed(self) -> float:
        return self.bytes / self.copy / 1e9


def publishing(bench: PpoBench) -> list[Row]:
    """Weights from the learner to two replicas on Ray, checksums compared, beside a plain copy of as many bytes."""
    rows: list[Row] = []
    for index, mib in enumerate(bench.sizes.buckets_mib):
        found = _deliveries(bench, mib)
        speed, copies = (
            Measured(tuple(one.speed for one in found)),
            Measured(tuple(one.copy_speed for one in found)),
        )
        share = Measured(tuple(one.checksums / one.verified for one in found))
        what = f"publishing {found[0].bytes / 1e6:.0f} MB to 2 Ray replicas, buckets of {mib} MiB"
        bars = (0.2, 1 / 3) if index == 0 else (None, None)
        ratio = speed.median / copies.median
        rows += [
            Row(f"{what}: until verified / copy", speed.shown("GB/s"), copies.shown("GB/s"), ratio, bars[0]),
            Row(f"{what}: checksums' share", share.shown("", 2), "", share.median, bars[1], "lower"),
        ]
        ready = Measured(tuple(one.ready for one in found)).shown("s")
        bench.notes.append(f"{what}: every replica ready to answer after {ready}.")
    bench.notes.append(
        "publish: verified is when the last replica has copied the weights and compared checksums, from the beginning of "
        "publishing; then it packs its matrices anew. A copy is torch's copy_ between two flat buffers with the run's threads. "
        "The checksum's share is the learner's plus the slowest replica's (all replicas at once), as if nothing of it overlapped."
    )
    return rows


def _deliveries(bench: PpoBench, mib: int) -> list[Delivery]:
    """Versions published one after the other; the first one, which makes the buffers, is not counted."""
    config = bench.config(f"publish-{mib}")
    config = config.replace(rollout=config.rollout.replace(bucket_mib=mib))
    pool = PoolConfig(replicas=2, cpus=0.25, threads=1)
    found = []
    with _pools(PoolPlan((RoleSpec(ROLLOUT, WatchedPolicy, config, pool),), keep_versions=1)) as pools:
        context = WorkerContext(0, 1, CPU, RunFolder.of(config.run), pools)
        prepare_process(config.runtime)
        learner = make_learner(config, context)
        policy, engine, replicas = learner.model.policy, learner.engine, pools[ROLLOUT]
        for version in range(bench.sizes.publish_repeats + 1):
            began = time.monotonic()
            published = publish(policy, engine, version, config, context)
            ready = time.monotonic() - began
            assert published is not None
            verified = max(replicas.broadcast(WatchedPolicy.when_verified, None, phase="verified")) - began
            own = sum(_checksum_seconds(bucket) for bucket in weight_buckets(policy, engine, config))
            theirs = max(replicas.broadcast(WatchedPolicy.checksum_seconds, version, phase="checksum"))
            copy = _copy_seconds(published.bytes)
            found.append(Delivery(published.bytes, verified, ready, own + theirs, copy))
    return found[1:]


def _copy_seconds(size: int) -> float:
    """A copy between two buffers whose pages are there."""
    source, target = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started


def _checksum_seconds(bucket: dict[str, Tensor]) -> float:
    started = time.perf_counter()
    bucket_checksum(bucket)
    return time.perf_counter() - started
