"""What Ray's pools do when replicas, learners and clients die, hang, or cannot be built."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.config.pools import PoolConfig
from fmray.errors import ConfigError, PoolError, ResourceError
from fmray.runtime.pool import PoolPlan, Pools, RoleSpec
from tests.contract.roles import BuildableOnce, Player, Samples, SlowToBuild, Unbuildable, ended
from tests.contract.test_pools import samples
from tests.contract.test_weights import assert_same, buckets, fetched

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.slow]
CPU = torch.device("cpu")


def config(**changes: Any) -> PoolConfig:
    return PoolConfig(cpus=0.25, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module")
def handles(ray_session: None, folder: Path) -> Iterator[Any]:
    from fmray.runtime.ray_pools import running_pools

    plan = PoolPlan(
        (
            RoleSpec("rollout", Player, str(folder), config(replicas=2, max_restarts=-1, timeout_seconds=90)),
            RoleSpec("reference", Player, str(folder), config(max_restarts=-1, timeout_seconds=90)),
            RoleSpec("once", Player, str(folder), config(max_restarts=0)),
            RoleSpec("gone", BuildableOnce, str(folder / "built"), config(max_restarts=-1)),
        ),
        keep_versions=2,
    )
    with running_pools(plan) as handles:
        yield handles


@pytest.fixture
def pools(handles: Any) -> Pools:
    """A client of its own for each test."""
    client: Pools = handles.client(CPU)
    return client


def kill_later(pid: int, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    return timer


# ------------------------------------------------------------------------------------------------------------------ deaths


def test_a_request_of_a_killed_replica_is_answered_by_another_one(pools: Pools) -> None:
    pool = pools["rollout"]
    first, second = pool.broadcast(Player.pid, None, phase="who")
    answers = [pool.submit(Player.nap, 1.0, phase="act") for _ in range(3)]
    kill_later(first, 0.3)
    began = time.monotonic()
    assert [answer.result() for answer in answers] == [second] * 3
    assert time.monotonic() - began < 60
    pids = pool.broadcast(Player.pid, None, phase="who")  # waits for the rebuilt one
    assert pids[1] == second
    assert pids[0] != first


def test_a_death_in_the_middle_of_an_answer_changes_no_bit(pools: Pools, folder: Path) -> None:
    pool = pools["rollout"]
    before = pool.submit(Player.sample, samples(3), phase="act").result()
    killer = pool.submit(Player.die_once, "mid-answer", phase="act")
    answers = [pool.submit(Player.sample, samples(3), phase="act") for _ in range(6)]
    assert killer.result() > 0
    assert (folder / "mid-answer").exists()
    for answer in answers:
        assert torch.equal(answer.result(), before)


def test_a_replica_that_ray_restarts_by_request_counts_as_dead_too(pools: Pools, handles: Any) -> None:
    pool = pools["rollout"]
    before = pool.broadcast(Player.pid, None, phase="who")
    answers = [pool.submit(Player.nap, 1.0, phase="act") for _ in range(2)]
    time.sleep(0.3)
    ray.kill(handles.actors["rollout"][1], no_restart=False)
    assert {answer.result() for answer in answers} == {before[0]}


def test_a_broadcast_waits_for_the_rebuilt_replica(pools: Pools) -> None:
    pool = pools["rollout"]
    before = pool.broadcast(Player.pid, None, phase="who")
    kill_later(before[1], 0.3)
    after = pool.broadcast(Player.nap, 1.0, phase="refresh")
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_the_only_replica_comes_back_with_the_current_weights(pools: Pools) -> None:
    pool = pools["reference"]
    pools.weights.publish(7, buckets(7))
    published = pools.weights.publish(8, buckets(8))
    assert pool.broadcast(Player.load, 7, phase="refresh") != [published.checksum]
    answer = pool.submit(Player.die_once, "only-one", phase="judge")
    queued = pool.submit(Player.version, None, phase="judge")
    assert answer.result() > 0
    assert queued.result() == 8
    assert pool.broadcast(Player.load, 8, phase="refresh") == [published.checksum]


def test_used_up_restarts_end_in_an_error_that_says_where(pools: Pools) -> None:
    pool = pools["once"]
    assert pool.submit(Player.double, 2, phase="judge").result() == 4
    pattern = r"pool once, .*, phase judge: no replica is left: replica 0 died, max_restarts=0"
    began = time.monotonic()
    for _ in range(2):  # the one who met the death, and whoever comes after
        with pytest.raises(PoolError, match=pattern):
            pool.submit(Player.die, None, phase="judge").result()
    with pytest.raises(PoolError, match="pool once, replica 0, phase refresh: replica 0 died"):
        pool.broadcast(Player.version, None, phase="refresh")
    assert time.monotonic() - began < 30  # it does not wait for its limit


def test_the_learner_that_published_may_die(pools: Pools, handles: Any) -> None:
    class Learner:
        def publish(self, version: int) -> int:
            return int(handles.store.publish(version, buckets(version)).checksum)

        def begin(self, version: int) -> None:
            def endless() -> Iterator[Any]:
                yield from buckets(version)
                time.sleep(60)

            handles.store.publish(version, endless())

    learner = ray.remote(Learner).options(num_cpus=0.25).remote()
    checksum = ray.get(learner.publish.remote(20))
    learner.begin.remote(21)  # and is killed in the middle of the next
    time.sleep(1.0)
    ray.kill(learner)
    time.sleep(1.0)
    assert pools.weights.newest() == 20
    assert_same(fetched(pools.weights, 20), buckets(20))
    assert set(pools["rollout"].broadcast(Player.load, 20, phase="refresh")) == {checksum}
    pools.weights.publish(21, buckets(210))  # the resumed learner's
    assert_same(fetched(pools.weights, 21), buckets(210))


# ------------------------------------------------------------------------------------------------------- limits and errors


def test_a_hanging_role_ends_in_an_error_that_says_where(handles: Any) -> None:
    from fmray.runtime.ray_pool import RayPool

    pool = RayPool("reference", config(timeout_seconds=1.0), handles.actors["reference"])
    began = time.monotonic()
    slow, queued = (pool.submit(Player.nap, 4.0, phase="judge") for _ in range(2))
    with pytest.raises(
        PoolError, match=r"pool reference, replica 0, phase judge: no answer in 1 s \(timeout_"
    ):
        slow.result()
    with pytest.raises(PoolError, match="pool reference, no replica yet, phase judge: no answer in 1 s"):
        queued.result()
    assert time.monotonic() - began < 4
    time.sleep(4)
    assert slow.result() > 0  # a limit is of a wait: who waits again may have it


def test_what_cannot_be_sent_is_said_and_breaks_nothing(pools: Pools) -> None:
    pool = pools["rollout"]
    busy = [pool.submit(Player.nap, 0.5, phase="act") for _ in range(2)]
    for _ in range(2):  # sent by the caller, and by the pool's own thread
        with pytest.raises(TypeError, match="serialize"):
            pool.submit(Player.echo, threading.Lock(), phase="act").result()  # type: ignore[arg-type]
        assert all(answer.result() > 0 for answer in busy)


def test_a_role_that_cannot_be_built_ends_the_start_with_its_own_error(ray_session: None) -> None:
    from fmray.runtime.ray_pools import running_pools

    plan = PoolPlan(
        (
            RoleSpec("slow", SlowToBuild, 120.0, config()),
            RoleSpec("reward.grammar", Unbuildable, "no/such", config(max_restarts=-1)),
        )
    )
    began = time.monotonic()
    with pytest.raises(ConfigError, match="'no/such': no such model") as raised, running_pools(plan):
        pass
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 60  # not for ever, and not until the slow one is there


def test_a_module_that_the_replicas_cannot_import_is_named(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmray.runtime.ray_pools import running_pools

    (tmp_path / "my_rewards.py").write_text("class Mine:\n    def __init__(self, key, place): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # of this process alone
    mine = importlib.import_module("my_rewards").Mine
    plan = PoolPlan((RoleSpec("reward.mine", mine, None, config(max_restarts=-1)),))
    pattern = "pool reward.mine, replica 0, phase start: .* No module named 'my_rewards'"
    with pytest.raises(PoolError, match=pattern), running_pools(plan):
        pass


def test_a_role_that_cannot_be_rebuilt_ends_the_run_with_its_own_error(pools: Pools) -> None:
    pool = pools["gone"]
    with pytest.raises(ConfigError, match="'gone': no such model"):
        pool.submit(BuildableOnce.die, None, phase="judge").result()
    with pytest.raises(ConfigError, match="'gone': no such model"):
        pool.submit(BuildableOnce.die, None, phase="judge").result()


def test_a_pool_that_is_not_ready_in_time_names_its_replica(ray_session: None) -> None:
    from fmray.runtime.ray_pools import running_pools

    slow = PoolPlan((RoleSpec("reward.slow", SlowToBuild, 120.0, config(start_timeout_seconds=15)),))
    with (
        pytest.raises(PoolError, match=r"pool reward.slow, replica 0, phase start: not ready in 15 s"),
        running_pools(slow),
    ):
        pass
    elsewhere = PoolPlan(
        (RoleSpec("far", Player, None, config(labels={"zone": "moon"}, start_timeout_seconds=3)),)
    )
    with (
        pytest.raises(PoolError, match=r"pool far, replica 0, phase start: .* a node with zone=moon"),
        running_pools(elsewhere),
    ):
        pass


def test_amounts_that_ray_does_not_take_are_a_configuration_error(ray_session: None) -> None:
    from fmray.runtime.ray_pools import running_pools

    plan = PoolPlan((RoleSpec("rollout", Player, None, config(resources={"CPU": 1.0})),))
    with pytest.raises(ConfigError, match="pool rollout"), running_pools(plan):
        pass


# ------------------------------------------------------------------------------------------------------------------ clients


class Client:
    """Another process that asks the same pools."""

    def __init__(self, handles: Any, rank: int) -> None:
        self.pools = handles.client(CPU, rank, 2)

    def ask(self, seed: int) -> list[torch.Tensor]:
        answers = [
            self.pools["rollout"].submit(Player.sample, samples(seed + n), phase="act") for n in range(4)
        ]
        return [answer.result() for answer in answers]

    def first(self) -> int:
        return int(self.pools["rollout"].submit(Player.pid, None, phase="act").result())


def test_two_clients_ask_at_once_and_begin_apart(pools: Pools, handles: Any) -> None:
    clients = [ray.remote(Client).options(num_cpus=0.25).remote(handles, rank) for rank in range(2)]
    pids = pools["rollout"].broadcast(Player.pid, None, phase="who")
    assert ray.get([client.first.remote() for client in clients], timeout=60) == pids
    told = ray.get([client.ask.remote(10 * rank) for rank, client in enumerate(clients)], timeout=60)
    for rank, answers in enumerate(told):
        for n, answer in enumerate(answers):
            expected = pools["rollout"].submit(Player.sample, samples(10 * rank + n), phase="act").result()
            assert torch.equal(answer, expected)
    for client in clients:
        ray.kill(client)


def test_a_careless_role_spoils_no_shared_request(pools: Pools) -> None:
    sent = Samples(torch.ones(300, 400, dtype=torch.int64), torch.zeros(1))
    shared = pools.share(sent)
    for _ in range(2):
        assert pools["rollout"].broadcast(Player.spoil, shared, phase="judge") == [120_000] * 2


def test_rows_of_a_batch_travel_alone(pools: Pools) -> None:
    import ray.cloudpickle

    batch = torch.zeros(256, 3, 64, 64, dtype=torch.uint8)
    assert len(ray.cloudpickle.dumps(batch[:8])) < 2 * batch[:8].numel()


def test_a_replica_has_the_threads_and_the_device_it_was_given(pools: Pools) -> None:
    assert pools["rollout"].broadcast(Player.threads, None, phase="who") == [1, 1]
    assert pools["rollout"].broadcast(Player.device, None, phase="who") == ["cpu", "cpu"]


def test_nothing_is_left_when_the_run_is_over(ray_session: None) -> None:
    from fmray.runtime.ray_pools import running_pools

    plan = PoolPlan((RoleSpec("rollout", Player, None, config()),))
    interrupted = contextlib.ExitStack()
    handles = interrupted.enter_context(running_pools(plan))
    pid = handles.client(CPU)["rollout"].broadcast(Player.pid, None, phase="who")[0]
    with pytest.raises(KeyboardInterrupt), interrupted:
        raise KeyboardInterrupt
    assert ended(pid)
    with pytest.raises(PoolError, match="weights: the shelf is lost"):
        handles.store.newest()


def test_more_than_the_cluster_has_is_said_before_anything_starts(ray_session: None) -> None:
    from fmray.config.schema import RuntimeConfig
    from fmray.runtime.ray_train import _require

    plan = PoolPlan((RoleSpec("rollout", Player, None, PoolConfig(replicas=3, cpus=1.5)),))
    runtime = RuntimeConfig(kind="ray", workers=2)
    with pytest.raises(
        ResourceError, match=r"runtime.workers=2 and the pools rollout×3 need 6.5 CPU, but .* has 4"
    ):
        _require(runtime, plan)
