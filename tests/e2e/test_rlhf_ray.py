"""PPO with the learners under Ray Train and every role in actors of its own: equal to local runs, and alive after deaths."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmray.config.rlhf import RlhfConfig
from fmray.rlhf.loop import train_ppo
from fmray.rlhf.roles import pool_plan
from fmray.runtime.context import Outcome
from fmray.runtime.launch import launch
from tests.e2e.test_rlhf_local import lines
from tests.processes import assert_bit_equal, state
from tests.quizzes import quiz_run, tiny_seer
from tests.stories import story_run, tiny_gpt2, tiny_t5

pytestmark = [pytest.mark.ray, pytest.mark.slow]

POOL = {"cpus": 0.2, "threads": 1, "timeout_seconds": 120}


PLACED: dict[str, Any] = {
    "runtime": {"kind": "ray", "workers": 1, "threads": 1, "cpus_per_worker": 0.5},
    "rollout.pool": {**POOL, "replicas": 2},
    "reference.pool": POOL,
    "rewards.letters.pool": {**POOL, "replicas": 2},
}


def on_ray(folder: Path, policy: Path, **changes: Any) -> RlhfConfig:
    """Two rollout actors, a reference, a reward in an actor and one in the learners."""
    return story_run(folder, policy, **{**PLACED, **changes})


def run(config: RlhfConfig) -> Outcome:
    return launch(train_ppo, config, steps=config.train.iterations, pools=pool_plan(config))


def assert_equal_runs(folder: Path, first: str, second: str, tolerance: float) -> None:
    """Every report of both, number by number."""
    ours, theirs = lines(folder, first), lines(folder, second)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            assert other[name] == pytest.approx(value, abs=tolerance, rel=tolerance), (mine["step"], name)


@pytest.mark.deepspeed
@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_6_23_local_and_ray_give_one_curve(ray_session: None, family: str, tmp_path: Path) -> None:
    """One learner: equal to 1e-6, whatever the engine. Two learners under ZeRO-3: the same samples, losses to rounding."""
    policy = (tiny_t5 if family == "t5" else tiny_gpt2)(tmp_path / family)
    steady = {"optimizer.eps": 1e-3, "critic.kind": "shared" if family == "t5" else "separate"}
    run(story_run(tmp_path, policy, **steady, **{"run.name": "local"}))
    run(on_ray(tmp_path, policy, **steady, **{"run.name": "ray1"}))
    assert_equal_runs(tmp_path, "local", "ray1", 1e-6)
    two = {"runtime.workers": 2, "engine.kind": "deepspeed", "engine.zero_stage": 3, "run.name": "ray2"}
    run(on_ray(tmp_path, policy, **steady, **two))
    assert_equal_runs(tmp_path, "local", "ray2", 2e-4)


def test_6_23_a_policy_that_sees_has_one_curve_too(ray_session: None, tmp_path: Path) -> None:
    """Pixels and answers travel to every pool and back, samples of a prompt together; also while they are in flight."""
    seer = tiny_seer(tmp_path / "seer")
    options = {"optimizer.eps": 1e-3, "rollout.samples_per_prompt": 2, "rollout.max_staleness": 1}
    run(quiz_run(tmp_path, seer, **options, **{"run.name": "local"}))
    placed = {**PLACED, "rewards.answer.pool": POOL}
    run(quiz_run(tmp_path, seer, **placed, **options, **{"run.name": "ray"}))
    assert_equal_runs(tmp_path, "local", "ray", 1e-6)
    held_out = "held_out/version-00000002.jsonl"
    assert (tmp_path / "runs/ray" / held_out).read_text() == (tmp_path / "runs/local" / held_out).read_text()


def processes_of(role: str) -> list[int]:
    """Ids of the living actors that hold a role, or of the learners."""
    import ray
    from ray.util.state import list_actors

    found = []
    here = ray.get_runtime_context().gcs_address  # other tests may have clusters of their own
    for actor in list_actors(here, filters=[("state", "=", "ALIVE")], limit=200, detail=True):
        named = str(actor.get("repr_name") or actor.get("class_name") or "")
        if role in named and actor.get("pid"):
            found.append(int(actor["pid"]))
    return found


def while_running(config: RlhfConfig, folder: Path, step: int, disturb: Callable[[], None]) -> Outcome:
    """Run, and once `step` was reported, disturb it."""
    told: list[Any] = []

    def work() -> None:
        try:
            told.append(run(config))
        except Exception as error:  # shown by the test
            told.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines(folder, config.run.name)):
        assert thread.is_alive(), told
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
    disturb()
    thread.join(240)
    assert told, "the run hangs"
    if isinstance(told[0], Exception):
        raise told[0]
    outcome: Outcome = told[0]
    return outcome


LONG = {"train.iterations": 60, "train.checkpoint_every": 5, "train.samples_every": 60}


def kill(role: str) -> Callable[[], None]:
    def now() -> None:
        found = processes_of(role)
        assert found, f"no process of {role}"
        os.kill(found[0], signal.SIGKILL)

    return now


def test_6_22_dead_rollout_reward_and_learner_change_nothing(ray_session: None, tmp_path: Path) -> None:
    """Bit-equal to the undisturbed run: no prompt lost, none used twice, the same weights at the end."""
    policy = tiny_t5(tmp_path / "t5")
    run(story_run(tmp_path, policy, **LONG, **{"run.name": "whole"}))
    expected = state(tmp_path, "whole", 60)
    for name, role in {
        "rollout": "rollout[",
        "reward": "reward.letters[",
        "learner": "RayTrainWorker",
    }.items():
        config = on_ray(tmp_path, policy, **LONG, **{"run.name": name})
        assert while_running(config, tmp_path, 7, kill(role)).finished
        assert_equal_runs(tmp_path, "whole", name, 0.0)
        assert_bit_equal(state(tmp_path, name, 60), expected)


def test_6_25_a_role_that_hangs_ends_the_run_naming_pool_replica_and_phase(
    ray_session: None, tmp_path: Path
) -> None:
    pool = {"cpus": 0.2, "threads": 1, "timeout_seconds": 3}
    hanging = {"rewards.letters.function": "tests.stories:never", "rewards.letters.pool": pool}
    config = on_ray(tmp_path, tiny_t5(tmp_path / "t5"), **hanging, **{"runtime.max_failures": 0})
    with pytest.raises(Exception, match=r"pool reward\.letters, replica 0, phase judge: no answer in 3 s"):
        run(config)


def test_a_reward_that_cannot_be_built_ends_the_run_in_one_line(ray_session: None, tmp_path: Path) -> None:
    policy = tiny_t5(tmp_path / "t5")
    wrong = {"rewards.letters.function": "tests.stories:no_such_function"}
    with pytest.raises(Exception, match="no_such_function"):
        run(on_ray(tmp_path, policy, **wrong))


def test_pools_too_large_for_the_cluster_are_refused_before_they_start(
    ray_session: None, tmp_path: Path
) -> None:
    config = on_ray(tmp_path, tiny_t5(tmp_path / "t5"), **{"reference.pool": {"cpus": 100}})
    with pytest.raises(
        Exception, match=r"the pools rollout×2, reference×1.*need .* CPU, but the cluster has 4"
    ):
        run(config)


def test_stale_samples_on_ray_are_the_local_runs(ray_session: None, tmp_path: Path) -> None:
    """max_staleness 2 with pools that work while the learner learns: the same numbers as one after the other."""
    policy = tiny_t5(tmp_path / "t5")
    ahead = {"rollout.max_staleness": 2, "train.iterations": 6}
    run(story_run(tmp_path, policy, **ahead, **{"run.name": "local"}))
    run(on_ray(tmp_path, policy, **ahead, **{"run.name": "ray"}))
    assert_equal_runs(tmp_path, "local", "ray", 1e-6)
    stale = [line["ppo/staleness"] for line in lines(tmp_path, "ray") if "ppo/staleness" in line]
    assert stale == [0, 1, 2, 2, 2, 2]
    rows = json.loads((tmp_path / "runs/ray/samples/step-00000006.json").read_text())
    assert rows == json.loads((tmp_path / "runs/local/samples/step-00000006.json").read_text())
