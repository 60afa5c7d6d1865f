"""One contract for pools in this process and over Ray actors: the same tests run on both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fmray.config.pools import PoolConfig
from fmray.errors import ConfigError, RewardError
from fmray.runtime.pool import LocalPools, PoolPlan, Pools, RoleSpec
from tests.contract.roles import Player, Samples

CPU = torch.device("cpu")
QUARTER = PoolConfig(cpus=0.25)
PLAN = PoolPlan(
    (
        RoleSpec("rollout", Player, None, QUARTER.replace(replicas=2)),
        RoleSpec("rule", Player, None, PoolConfig(replicas=0)),
    )
)
REPLICAS = {"local": {"rollout": 1, "rule": 1}, "ray": {"rollout": 2, "rule": 1}}


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pools(kind: str, request: pytest.FixtureRequest) -> Iterator[Pools]:
    if kind == "local":
        yield LocalPools(PLAN, CPU)
        return
    request.getfixturevalue("ray_session")
    from fmray.runtime.ray_pools import running_pools

    with running_pools(PLAN) as handles:
        yield handles.client(CPU)


def samples(seed: int = 0) -> Samples:
    noise = torch.Generator().manual_seed(100 + seed)
    ids_BT = torch.randint(0, 32000, (8, 64), generator=noise)
    pixels_BCHW = torch.randint(0, 256, (8, 3, 32, 32), generator=noise, dtype=torch.uint8)
    return Samples(ids_BT, pixels_BCHW, seed)


def test_each_request_gets_its_own_answer_in_whatever_order_they_are_read(pools: Pools) -> None:
    answers = [pools["rollout"].submit(Player.double, n, phase="act") for n in range(20)]
    assert [answer.result() for answer in reversed(answers)] == [2 * n for n in reversed(range(20))]
    assert answers[3].result() == 6  # twice asked, twice told


def test_an_answer_is_a_function_of_the_request_alone(pools: Pools) -> None:
    here = Player(None, LocalPools(PLAN, CPU)._place)
    for seed in (1, 2):
        answers = [pools["rollout"].submit(Player.sample, samples(seed), phase="act") for _ in range(4)]
        for answer in answers:
            assert torch.equal(answer.result(), here.sample(samples(seed)))


def test_what_a_role_raises_comes_as_it_was_raised(pools: Pools) -> None:
    pool = pools["rollout"]
    with pytest.raises(RewardError) as refused:
        pool.submit(Player.refuse, "the cat sat", phase="judge").result()
    assert (type(refused.value), str(refused.value)) == (
        RewardError,
        "reward grammar: no score for 'the cat sat'",
    )
    with pytest.raises(ConfigError, match="must be positive") as misused:
        pool.submit(Player.misuse, "rollout.top_p", phase="judge").result()
    assert misused.value.key == "rollout.top_p"
    with pytest.raises(KeyError, match="not there"):
        pool.submit(Player.stumble, None, phase="judge").result()
    with pytest.raises(TimeoutError, match="scorer's server"):  # its own, not the pool's limit
        pool.submit(Player.run_out_of_time, None, phase="judge").result()
    with pytest.raises(RewardError):
        pool.broadcast(Player.refuse, "the cat sat", phase="judge")
    assert pool.submit(Player.double, 4, phase="judge").result() == 8  # and it is still there


def test_a_broadcast_asks_every_replica_once(pools: Pools, kind: str) -> None:
    for name in ("rollout", "rule"):
        pids = pools[name].broadcast(Player.pid, None, phase="who")
        assert len(pids) == len(set(pids)) == REPLICAS[kind][name]


def test_a_shared_value_is_asked_of_several_pools(pools: Pools) -> None:
    here = Player(None, LocalPools(PLAN, CPU)._place)
    shared = pools.share(samples(5))
    answers = [pools[name].submit(Player.sample, shared, phase="judge") for name in ("rollout", "rule")]
    told = [
        *(answer.result() for answer in answers),
        *pools["rollout"].broadcast(Player.sample, shared, phase="judge"),
    ]
    assert all(torch.equal(answer, here.sample(samples(5))) for answer in told)


def test_payloads_arrive_bit_for_bit(pools: Pools) -> None:
    for ids in (
        torch.randn(3, 5).to(torch.bfloat16),
        torch.arange(12).view(3, 4).t(),  # not contiguous
        torch.tensor([True, False]),
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0, 7, dtype=torch.int32),
        torch.randn(2, 2, requires_grad=True),
    ):
        sent = Samples(ids, samples().pixels_BCHW)
        got = pools["rollout"].submit(Player.echo, sent, phase="act").result()
        assert got.ids_BT.dtype == ids.dtype
        assert got.ids_BT.shape == ids.shape
        assert torch.equal(got.ids_BT, ids)
        assert got.ids_BT.requires_grad == ids.requires_grad
        assert torch.equal(got.pixels_BCHW, sent.pixels_BCHW)


def test_roles_load_what_was_published(pools: Pools) -> None:
    weights = {"embed": torch.randn(50, 8), "scale": torch.tensor(0.5)}
    for version in (0, 1):
        published = pools.weights.publish(version, [weights])
        for name in ("rollout", "rule"):
            checksums = set(pools[name].broadcast(Player.load, version, phase="refresh"))
            assert checksums == {published.checksum}
            assert set(pools[name].broadcast(Player.version, None, phase="refresh")) == {version}


def test_a_pool_that_is_not_in_the_plan_is_a_key_error(pools: Pools) -> None:
    with pytest.raises(KeyError):
        pools["reference"]
