"""Learners under Ray Train with pools beside them: the same answers as in local mode, and pools that outlive a learner."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.config.pools import PoolConfig
from fmray.config.schema import PretrainConfig, ReportConfig, RunConfig, RuntimeConfig
from fmray.errors import ConfigError, RewardError
from fmray.runtime.context import Context, Outcome
from fmray.runtime.launch import launch
from fmray.runtime.pool import PoolPlan, RoleSpec
from tests.contract.roles import Player, Unbuildable, ended
from tests.contract.test_pools import samples
from tests.contract.test_weights import buckets

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PLAN = PoolPlan(
    (
        RoleSpec("rollout", Player, None, PoolConfig(cpus=0.25, replicas=2)),
        RoleSpec("rule", Player, None, PoolConfig(replicas=0)),
    )
)
REQUESTS = 6


def configured(folder: Path, name: str, **runtime: Any) -> PretrainConfig:
    runtime = {"cpus_per_worker": 0.5, "threads": 1, **runtime}
    return PretrainConfig(
        run=RunConfig(name=name, storage=str(folder)),
        runtime=RuntimeConfig(**runtime),
        report=ReportConfig(progress=False),
    )


def play(config: PretrainConfig, context: Context) -> Outcome:
    """Each rank asks its share of the requests, of the actors and of the role it holds; rank 0 writes down the answers."""
    pools = context.pools
    if context.rank == 0:
        pools.weights.publish(1, buckets())
    context.barrier()
    sums = torch.zeros(REQUESTS, 2)
    mine = [n for n in range(REQUESTS) if n % context.world_size == context.rank]
    answers = [
        [pools[name].submit(Player.sample, samples(n), phase="act") for name in ("rollout", "rule")]
        for n in mine
    ]
    for n, pair in zip(mine, answers, strict=True):
        sums[n] = torch.stack([answer.result().sum() for answer in pair])
    sums = context.sum(sums)
    checksum = pools["rule"].broadcast(Player.load, 1, phase="refresh")
    pids = pools["rollout"].broadcast(Player.pid, None, phase="who")
    context.barrier()
    if context.rank == 0:
        line = {"sums": sums.tolist(), "checksum": checksum, "pids": pids}
        context.folder.write_text(json.dumps(line), f"answers-{_groups(context)}.json")
    context.barrier()
    if config.runtime.max_failures == 1 and context.world_size == 2 and _groups(context) == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # the whole first group, after it has published
    return Outcome(steps=1, finished=True)


def _groups(context: Context) -> int:
    """How many worker groups have written down their answers."""
    return sum(context.folder.exists(f"answers-{number}.json") for number in range(3))


def refused(config: PretrainConfig, context: Context) -> Outcome:
    context.pools["rollout"].submit(Player.refuse, "the cat sat", phase="judge").result()
    return Outcome(steps=0, finished=True)


def answers(folder: Path, name: str, number: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / name / f"answers-{number}.json").read_text())
    return told


def test_local_and_ray_give_the_same_answers_and_pools_outlive_the_learners(
    ray_session: None, tmp_path: Path
) -> None:
    launch(play, configured(tmp_path, "local"), pools=PLAN)
    launch(play, configured(tmp_path, "ray", kind="ray", workers=2, max_failures=1), pools=PLAN)
    here, first, second = answers(tmp_path, "local"), answers(tmp_path, "ray"), answers(tmp_path, "ray", 1)
    for told in (first, second):
        assert told["sums"] == here["sums"]
        assert told["checksum"] == here["checksum"]
    assert len(set(first["pids"])) == 2
    assert first["pids"] == second["pids"]  # the group of learners died, the replicas stayed
    assert all(ended(pid) for pid in first["pids"])  # and went with the run


def test_a_run_ends_with_what_a_role_raised_or_what_kept_it_from_being_built(
    ray_session: None, tmp_path: Path
) -> None:
    with pytest.raises(RewardError, match="reward grammar: no score for 'the cat sat'"):
        launch(refused, configured(tmp_path, "refused", kind="ray", max_failures=0), pools=PLAN)
    broken = PoolPlan((RoleSpec("reward.grammar", Unbuildable, "no/such", PoolConfig(cpus=0.25)),))
    with pytest.raises(ConfigError, match="'no/such': no such model"):
        launch(refused, configured(tmp_path, "broken", kind="ray"), pools=broken)
