"""The bank: normalisation over the run and over ranks, clipping, weights, failures and their budgets, resume."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fmray.config.rewards import LengthReward, RepetitionReward, RewardConfig
from fmray.errors import CheckpointError, RewardError
from fmray.rlhf.rewards import Judgement, Moments, RewardBank
from fmray.rlhf.sums import SumOverRanks, one_rank
from tests.unit.rlhf.answers import answers
from tests.workers import run_workers

NAN = math.nan


def reward(**keys: Any) -> RewardConfig:
    return LengthReward.model_validate(keys)


def combine(bank: RewardBank, **raw: list[float]) -> Judgement:
    count = len(next(iter(raw.values())))
    return bank.combine({name: torch.tensor(row) for name, row in raw.items()}, answers(["so"] * count), {})


# ------------------------------------------------------------------------------------------------- normalise, clip, weight


def test_the_score_is_the_weighted_sum_of_clipped_normalised_rewards() -> None:
    bank = RewardBank(
        {"a": reward(weight=2, clip=1), "b": reward(weight=-0.5, clip=None), "c": reward(normalize="none")}
    )
    a, b, c = [0.0, 0.0, 0.0, 8.0], [1.0, 2.0, 3.0, 6.0], [0.1, 0.2, 9.0, -9.0]
    found = combine(bank, a=a, b=b, c=c)
    z = {name: (np.array(row) - np.mean(row)) / np.std(row, ddof=1) for name, row in (("a", a), ("b", b))}
    expected = 2 * np.clip(z["a"], -1, 1) - 0.5 * z["b"] + np.clip(c, -5, 5)
    torch.testing.assert_close(found.scores_B, torch.tensor(expected, dtype=torch.float32))
    torch.testing.assert_close(
        found.normalized["a"], torch.tensor(np.clip(z["a"], -1, 1), dtype=torch.float32)
    )
    assert found.normalized["c"].tolist() == pytest.approx([0.1, 0.2, 5.0, -5.0])
    assert found.scored_B.tolist() == [True] * 4
    assert found.scores_B.dtype == torch.float32


def test_normalisation_is_by_all_scores_of_the_run_this_batch_included() -> None:
    bank = RewardBank({"a": reward(clip=None)})
    batches = [[1.0, 2.0], [10.0], [4.0, 4.0, 5.0]]
    seen: list[float] = []
    for batch in batches:
        seen += batch
        found = combine(bank, a=batch)
        deviation = np.std(seen, ddof=1)
        torch.testing.assert_close(
            found.scores_B, ((torch.tensor(batch) - np.mean(seen)) / deviation).float()
        )
    assert bank.state()["a"]["count"] == 6


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), max_size=6), min_size=1, max_size=6),
)
def test_moments_of_parts_are_the_moments_of_the_whole(parts: list[list[float]]) -> None:
    together = Moments()
    for part in parts:
        own = Moments()
        for value in part:
            own = own.with_batch(Moments(1, value, 0))
        together = together.with_batch(own)
    whole = [value for part in parts for value in part]
    assert together.count == len(whole)
    if whole:
        assert together.mean == pytest.approx(np.mean(whole), rel=1e-9, abs=1e-7)
    if len(whole) > 1:
        assert together.deviation == pytest.approx(np.std(whole, ddof=1), rel=1e-6, abs=1e-6)


def test_a_large_mean_costs_no_digits() -> None:
    found = combine(RewardBank({"a": reward()}), a=[16_000_000.0, 16_000_001.0, 16_000_002.0])
    assert found.metrics["reward/a/raw_std"] == pytest.approx(1.0)


@pytest.mark.parametrize("same", [0.0, 0.25, -1e6])
def test_a_reward_that_says_the_same_of_all_says_nothing(same: float) -> None:
    bank = RewardBank({"a": reward()})
    assert combine(bank, a=[same] * 4).scores_B.tolist() == [0.0] * 4
    nearly = combine(bank, a=[same, float(np.nextafter(np.float32(same), np.float32(2 * same)))]).scores_B
    assert nearly.abs().max() < 0.2  # float32's rounding is not blown up to a deviation of one
    assert combine(RewardBank({"a": reward()}), a=[3.0]).scores_B.tolist() == [0.0]


def test_a_weight_of_zero_is_measured_only() -> None:
    bank = RewardBank({"a": reward(), "watched": reward(weight=0, failure_budget=9)})
    found = combine(bank, a=[1.0, 2.0], watched=[NAN, 7.0])
    assert found.scored_B.tolist() == [True, True]
    assert found.scores_B.tolist() == combine(RewardBank({"a": reward()}), a=[1.0, 2.0]).scores_B.tolist()
    assert found.metrics["reward/watched/raw"] == 7.0
    assert found.metrics["reward/watched/failed"] == 1


def test_metrics_are_those_of_this_batch() -> None:
    bank = RewardBank({"a": reward(weight=2.0)})
    combine(bank, a=[100.0, 200.0])
    found = combine(bank, a=[1.0, 3.0])
    assert found.metrics["reward/a/raw"] == 2.0
    assert found.metrics["reward/a/raw_std"] == pytest.approx(math.sqrt(2))
    assert found.metrics["reward/a/normalized"] == pytest.approx(found.normalized["a"].mean().item())
    assert found.metrics["reward/score"] == pytest.approx(found.scores_B.mean().item())
    assert found.metrics["reward/score_std"] == pytest.approx(found.scores_B.std().item())


# ---------------------------------------------------------------------------------------------------------------- failures


def test_a_sample_that_failed_is_left_out_and_never_zero() -> None:
    bank = RewardBank({"a": reward(failure_budget=2), "b": reward()})
    found = combine(bank, a=[1.0, NAN, 3.0], b=[5.0, 6.0, 7.0])
    assert found.scored_B.tolist() == [True, False, True]
    assert found.scores_B.isnan().tolist() == [False, True, False]
    assert found.normalized["a"].isnan().tolist() == [False, True, False]
    assert not found.normalized["b"].isnan().any()
    assert bank.state()["a"]["count"] == 2  # the moments are of numbers alone
    assert found.metrics["reward/a/raw"] == 2.0
    assert found.metrics["reward/score"] == pytest.approx(found.scores_B[[0, 2]].mean().item())


def test_a_batch_of_failures_has_no_score_and_no_metric() -> None:
    bank = RewardBank({"a": reward(failure_budget=2)})
    found = combine(bank, a=[NAN, math.inf])
    assert found.scores_B.isnan().all()
    assert found.metrics == {"reward/a/failed": 2.0}
    assert combine(bank, a=[1.0, 2.0]).scores_B.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_a_budget_is_for_the_whole_run_and_the_error_holds_the_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bank = RewardBank({"fine": reward(), "polite": reward(failure_budget=2, weight=0)})
    rollouts = answers(["yes", "no", "so"], prompts=["why", "when", "who"])
    lines = {"polite": ("sample 61 (prompt 'when', response 'no'): timed out after 30 s",)}
    raw = {"fine": torch.ones(3), "polite": torch.tensor([1.0, NAN, 2.0])}
    with caplog.at_level(logging.WARNING):
        bank.combine(raw, rollouts, lines)
        bank.combine(raw, rollouts, lines)
    assert [record.message for record in caplog.records] == [f"reward 'polite': {lines['polite'][0]}"] * 2
    with pytest.raises(RewardError) as caught:
        bank.combine(raw, rollouts, lines)
    assert str(caught.value) == (
        "reward 'polite': 3 samples of this run could not be scored, rewards.polite.failure_budget=2 allows no more; "
        "sample 61 (prompt 'when', response 'no'): timed out after 30 s"
    )


def test_the_error_names_the_sample_where_the_reason_is_on_another_rank() -> None:
    rollouts = answers(["yes", "no"], prompts=["why", "when"])
    with pytest.raises(
        RewardError, match=r"sample 61 \(prompt 'when', response 'no'\): why is in the log of the rank"
    ):
        RewardBank({"a": reward()}).combine({"a": torch.tensor([0.0, NAN])}, rollouts, {"a": ()})


# ------------------------------------------------------------------------------------------------------------------- ranks

REWARDS = {
    "a": LengthReward(weight=1.0, failure_budget=50),
    "b": RepetitionReward(weight=-0.3, clip=0.7),
    "c": LengthReward(weight=0.2, normalize="none"),
}


def everyones_raw(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    raw = {name: torch.randn(12, generator=draw) * 10 ** (2 * i) + 50 for i, name in enumerate(REWARDS)}
    raw["a"][step] = NAN
    return raw


def all_reduced(values: Tensor) -> Tensor:
    total = values.clone()
    dist.all_reduce(total)
    return total


def judge_share(rows: slice, sum_over_ranks: SumOverRanks) -> tuple[list[Judgement], dict[str, Any]]:
    """Three steps of a bank on these rows of each batch."""
    bank, judged = RewardBank(REWARDS), []
    for step in range(3):
        raw = {name: values[rows] for name, values in everyones_raw(step).items()}
        judged.append(bank.combine(raw, answers(["so"] * len(raw["a"])), {}, sum_over_ranks))
    return judged, bank.state()


SPLITS = [(6, 12), (0, 1), (4, 8), (2, 9)]
"""Where the second and the third rank's rows begin: even, uneven, a rank without any."""


def on_a_rank(rank: int, _: int, sum_over_ranks: SumOverRanks = all_reduced) -> tuple[list[Any], str]:
    shares = [judge_share(slice(*(0, *cuts, 12)[rank : rank + 2]), sum_over_ranks) for cuts in SPLITS]
    raw = {"a": torch.tensor([1.0, NAN if rank == 1 else 2.0])}
    lines = {"a": ("sample 61 (…): timed out",) if rank == 1 else ()}
    with pytest.raises(RewardError) as caught:
        RewardBank({"a": LengthReward()}).combine(raw, answers(["so", "so"]), lines, sum_over_ranks)
    return shares, str(caught.value)


def in_threads(work: Callable[[int, int, SumOverRanks], Any], world_size: int) -> list[Any]:
    """Every rank a thread of this process; they meet at each sum."""
    everyone, said = threading.Barrier(world_size, timeout=20), [torch.empty(0)] * world_size

    def rank_sum(rank: int, values: Tensor) -> Tensor:
        said[rank] = values
        everyone.wait()
        total = torch.stack(said).sum(0)
        everyone.wait()
        return total

    with ThreadPoolExecutor(world_size) as threads:
        ranks = range(world_size)
        return list(threads.map(lambda rank: work(rank, world_size, partial(rank_sum, rank)), ranks))


def processes(work: Callable[..., Any], world_size: int) -> list[Any]:
    """Every rank a process, in a group of torch.distributed."""
    return run_workers(world_size, work)


@pytest.mark.parametrize("world", [in_threads, pytest.param(processes, marks=pytest.mark.slow)])
def test_any_split_among_ranks_gives_the_same_scores_and_all_stop_together(world: Any) -> None:
    alone, state = judge_share(slice(0, 12), one_rank)
    ranks = world(on_a_rank, 3)
    for split in range(len(SPLITS)):
        shares = [shares[split] for shares, _ in ranks]
        for step, whole in enumerate(alone):
            for field in ("scores_B", "scored_B"):
                parts = torch.cat([getattr(judged[step], field) for judged, _ in shares])
                torch.testing.assert_close(parts, getattr(whole, field), rtol=1e-6, atol=1e-7, equal_nan=True)
            for judged, _ in shares:
                assert judged[step].metrics == pytest.approx(whole.metrics, rel=1e-9)
        for _, saved in shares:
            assert saved == shares[0][1]  # every rank would save the same
            for name in REWARDS:
                assert saved[name] == pytest.approx(state[name], rel=1e-12)

    errors = [error for _, error in ranks]
    assert all(error.startswith("reward 'a': 1 samples of this run could not be scored") for error in errors)
    assert "another rank's sample" in errors[0]
    assert "sample 61 (…): timed out" in errors[1]


# ------------------------------------------------------------------------------------------------------------------ resume


def test_6_21_a_resumed_bank_goes_on_bit_equal_through_json() -> None:
    straight, saved = RewardBank(REWARDS), RewardBank(REWARDS)
    for step in range(2):
        for bank in (straight, saved):
            bank.combine(everyones_raw(step), answers(["so"] * 12), {})
    resumed = RewardBank(REWARDS)
    resumed.load(json.loads(json.dumps(saved.state())))
    found, expected = (
        bank.combine(everyones_raw(2), answers(["so"] * 12), {}) for bank in (resumed, straight)
    )
    assert torch.equal(found.scores_B.nan_to_num(99), expected.scores_B.nan_to_num(99))
    assert found.metrics == expected.metrics
    assert resumed.state() == straight.state()
    assert resumed.state()["a"]["failed"] == 3  # failures count over the whole run


def test_6_21_other_rewards_than_the_checkpoints_are_refused() -> None:
    state = RewardBank(REWARDS).state()
    with pytest.raises(
        CheckpointError, match=r"the checkpoint's rewards are a, b, c, the configuration's are a, b:"
    ):
        RewardBank({name: REWARDS[name] for name in "ab"}).load(state)
    for damaged in ({"count": 1}, {"count": "x", "mean": 0, "m2": 0, "failed": 0}, None):
        with pytest.raises(CheckpointError, match="damaged"):
            RewardBank(REWARDS).load(state | {"b": damaged})
    heavier = {name: config.replace(weight=9) for name, config in REWARDS.items()}
    RewardBank(heavier).load(state)  # weights are the configuration's: a sweep changes them on the way
