"""One iteration from the inside: reference/rlhf.md §6, the items that need a model and pools. Numbers are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fmray.config.rlhf import RlhfConfig
from fmray.errors import ConfigError, PoolError
from fmray.rlhf.learner import PpoLearner
from fmray.rlhf.losses import policy_metrics
from fmray.rlhf.ppo import learn, loss_of, mini_batches
from fmray.rlhf.publishing import publish, weight_buckets
from fmray.rlhf.roles import ROLLOUT, RolloutPolicy
from fmray.runtime.context import WorkerContext
from tests.rehearsal import credited, started, weights_of
from tests.stories import story_run, tiny_gpt2, tiny_llama, tiny_t5
from tests.workers import run_workers

FAMILIES = {"t5": tiny_t5, "gpt2": tiny_gpt2, "llama": tiny_llama}


@pytest.fixture(params=list(FAMILIES))
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FAMILIES[request.param](tmp_path / request.param)


def test_6_1_padding_is_told_by_length_where_its_id_is_real(tmp_path: Path) -> None:
    """GPT-2's padding is its EOS, T5's is its start token: real tokens of that id stay in the masks."""
    learner, context = started(story_run(tmp_path, tiny_gpt2(tmp_path / "gpt2")))
    judged, batch, _ = credited(learner, context)
    rollouts, lengths = judged.rollouts, judged.rollouts.mask_BT.sum(1).long()
    for row, length in enumerate(lengths.tolist()):
        assert rollouts.mask_BT[row, :length].all()
        assert not rollouts.mask_BT[row, length:].any()
        if rollouts.ended_B[row]:
            assert rollouts.response_ids_BT[row, length - 1] == learner.language.eos_id
    assert batch.credit.policy_mask_BT.sum() == lengths.sum()


def test_6_8_what_was_sampled_is_what_is_scored(policy: Path, tmp_path: Path) -> None:
    """At any temperature the sampler's log-probabilities are the learner's and the reference's."""
    config = story_run(tmp_path, policy, **{"rollout.temperature": 0.7})
    learner, context = started(config)
    judged, batch, metrics = credited(learner, context)
    assert metrics["ppo/logp_difference"] < 1e-5
    mask = judged.rollouts.mask_BT
    assert judged.reference_logp_BT is not None
    difference = (judged.rollouts.rollout_logp_BT - judged.reference_logp_BT) * mask
    assert difference.abs().max() < 1e-4
    assert batch.rollouts.tokens > 0


def test_6_9_dropout_is_off_in_every_model(tmp_path: Path) -> None:
    """The T5 on disk has dropout 0.1; nothing of it is left in policy, critic, rollout policy or reference."""
    learner, context = started(story_run(tmp_path, tiny_t5(tmp_path / "t5", dropout_rate=0.1)))
    learner.model.train()
    once, again = credited(learner, context)[1], credited(learner, context)[1]
    assert torch.equal(once.old_logp_BT, again.old_logp_BT)
    assert once.values_BT is not None
    assert again.values_BT is not None
    assert torch.equal(once.values_BT, again.values_BT)
    assert once.rollouts.responses == again.rollouts.responses


def test_6_10_ratio_is_one_in_the_first_mini_batch_and_kl_zero_at_step_zero(
    policy: Path, tmp_path: Path
) -> None:
    learner, context = started(story_run(tmp_path, policy))
    _, batch, metrics = credited(learner, context)
    assert abs(metrics["ppo/kl"]) < 1e-4
    mini_B = next(iter(mini_batches(len(batch.rollouts), learner.config, 0, 0)))
    _, (acted, _) = loss_of(batch, learner, mini_B, mini_B, 1, 0, context)
    first = policy_metrics(acted)
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert first["ratio_var"] < 1e-9
    assert first["approx_kl"] < 1e-9
    assert first["clip_fraction"] == 0


def test_6_16_defaults_are_the_fields(tmp_path: Path) -> None:
    config = RlhfConfig.model_validate({"rewards": {"length": {"kind": "length"}}})
    ppo, optimizer = config.ppo, config.optimizer
    assert (ppo.clip, ppo.value_clip, ppo.value_coefficient, ppo.epochs) == (0.2, 0.2, 0.1, 4)
    assert (ppo.gamma, ppo.lam, optimizer.eps, optimizer.schedule) == (1.0, 0.95, 1e-5, "linear")


def after_learning(learner: PpoLearner, context: WorkerContext) -> tuple[dict[str, Any], dict[str, Any]]:
    _, batch, credit_metrics = credited(learner, context)
    return weights_of(learner), credit_metrics | learn(batch, learner, 0, context)


# eps well above a gradient's rounding: Adam divides by it, and would compare that rounding where a gradient is tiny
STEADY = {"optimizer.eps": 1e-3, "ppo.mini_batch_size": 16, "ppo.epochs": 3}


@pytest.mark.parametrize("changed", [{"ppo.micro_batch_size": 3}, {"ppo.micro_batch_size": 1}])
def test_6_17_micro_batches_change_nothing(changed: dict[str, Any], policy: Path, tmp_path: Path) -> None:
    runs = []
    for options in ({}, changed):
        learner, context = started(story_run(tmp_path, policy, **STEADY, **options))
        _, metrics = after_learning(learner, context)
        runs.append((weights_of(learner), metrics))
    assert_alike(*runs)


def learn_on_ranks(
    rank: int, world_size: int, folder: str, policy: str, options: dict[str, Any]
) -> tuple[Any, Any, Any]:
    config = story_run(Path(folder) / f"rank{rank}", Path(policy), **STEADY, **options)
    learner, context = started(config, rank, world_size)
    judged, batch, metrics = credited(learner, context)
    metrics |= learn(batch, learner, 0, context)
    return weights_of(learner), metrics, judged.rollouts.responses


@pytest.mark.parametrize("stage", [None, pytest.param(0, marks=pytest.mark.deepspeed)])
def test_6_17_and_6_4_ranks_change_nothing(stage: int | None, tmp_path: Path) -> None:
    """Two gloo ranks sample the same answers and learn the same weights as one; so do ZeRO's engines."""
    policy = str(tiny_t5(tmp_path / "t5"))
    options: dict[str, Any] = {"critic.kind": "shared"}
    (alone,) = run_workers(1, learn_on_ranks, str(tmp_path), policy, options)
    if stage is None:
        pairs = run_workers(2, learn_on_ranks, str(tmp_path), policy, options)
    else:
        pairs = []
        for zero in (1, 3):
            engine = {"engine.kind": "deepspeed", "engine.zero_stage": zero}
            pairs += run_workers(2, learn_on_ranks, str(tmp_path), policy, options | engine)
    for weights, metrics, responses in pairs:
        assert responses == alone[2]
        assert_alike((alone[0], alone[1]), (weights, metrics))


def assert_alike(first: tuple[Any, Any], second: tuple[Any, Any]) -> None:
    assert first[0].keys() == second[0].keys()
    for name, weight in first[0].items():
        torch.testing.assert_close(second[0][name], weight, atol=1e-5, rtol=1e-4, msg=name)
    for name, value in first[1].items():
        assert second[1][name] == pytest.approx(value, abs=2e-5, rel=1e-4), name


@pytest.mark.parametrize("samples", [1, 2])
def test_6_4_a_sample_is_its_own_whatever_request_carries_it(
    samples: int, policy: Path, tmp_path: Path
) -> None:
    """Requests of other sizes, cut among other ranks, ask for the same samples and get the same tokens."""
    answers = []
    for size in (16, 4, 2):
        options = {"rollout.request_size": size, "rollout.samples_per_prompt": samples}
        learner, context = started(story_run(tmp_path, policy, **options))
        judged, _, _ = credited(learner, context)
        answers.append((judged.rollouts.sample_id_B.tolist(), judged.rollouts.responses))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0] == list(range(16))
    if samples == 2:
        assert len(set(judged.rollouts.prompt_B.tolist())) == 8
        assert len(set(answers[0][1])) > 8


def test_6_18_separate_critic_shares_nothing_and_shared_shares_the_trunk(tmp_path: Path) -> None:
    policy = tiny_t5(tmp_path / "t5")
    apart, _ = started(story_run(tmp_path, policy))
    shared, _ = started(story_run(tmp_path, policy, **{"critic.kind": "shared"}))
    assert apart.model.critic is not None
    owners = {id(p) for p in apart.model.policy.parameters()}
    assert not owners & {id(p) for p in apart.model.critic.parameters()}
    assert shared.model.critic is None
    assert shared.model.value_head is not None
    assert {group.name for group in apart.groups} == {"policy", "critic", "value_head"}


def test_6_20_weights_arrive_bit_for_bit_and_an_altered_byte_is_refused(policy: Path, tmp_path: Path) -> None:
    config = story_run(tmp_path, policy)
    learner, context = started(config)
    with torch.no_grad():
        for parameter in learner.model.policy.parameters():
            parameter.add_(0.01)
    published = publish(learner.model.policy, learner.engine, 1, config, context)
    role = context.pools[ROLLOUT].role  # type: ignore[attr-defined]
    for name, parameter in learner.model.policy.named_parameters():
        assert torch.equal(role._model.get_parameter(name), parameter), name
    assert published is not None
    assert published.bytes == sum(p.numel() * 4 for p in learner.model.policy.parameters() if p.requires_grad)
    _, buckets = context.pools.weights.fetch(1)
    next(next(buckets)[name] for name in [next(iter(dict(learner.model.policy.named_parameters())))])
    _, buckets = context.pools.weights.fetch(1)
    next(iter(next(buckets).values())).view(-1)[0] += 1e-3
    with pytest.raises(PoolError, match=r"weights of version 1 arrived altered"):
        context.pools[ROLLOUT].broadcast(RolloutPolicy.load, 1, phase="load weights 1")


def test_6_20_a_rollout_policy_that_is_not_the_learners_stops_the_run(tmp_path: Path) -> None:
    """Weights that never arrived show in the log-probabilities, whatever the versions say."""
    learner, context = started(story_run(tmp_path, tiny_t5(tmp_path / "t5")))
    with torch.no_grad():
        learner.model.policy.lm_head.weight.mul_(3)
    with pytest.raises(
        PoolError, match=r"rollout\.logp_limit=0\.05: the rollout policy is not the learner's"
    ):
        credited(learner, context)


def test_weights_travel_in_buckets_of_the_asked_size(tmp_path: Path) -> None:
    config = story_run(tmp_path, tiny_t5(tmp_path / "t5", d_model=256, d_ff=512), **{"rollout.bucket_mib": 1})
    learner, _ = started(config)
    buckets = list(weight_buckets(learner.model.policy, learner.engine, config))
    sizes = [sum(t.numel() * 4 for t in bucket.values()) for bucket in buckets]
    assert len(buckets) > 2
    assert max(sizes) <= 2**20
    assert sum(sizes) == sum(p.numel() * 4 for p in learner.model.policy.parameters())


def test_only_the_adapter_travels_with_lora(policy: Path, tmp_path: Path) -> None:
    """And it is its own reference with the adapter off: KL 0 before the first step, not after."""
    options: dict[str, Any] = {"policy.lora": {"rank": 4}, "reference.kind": "adapter_off"}
    config = story_run(tmp_path, policy, **options)
    learner, context = started(config)
    names = [n for b in weight_buckets(learner.model.policy, learner.engine, config) for n in b]
    assert names
    assert all("lora_" in name for name in names)
    _, batch, before = credited(learner, context)
    assert abs(before["ppo/kl"]) < 1e-5
    frozen = {n: p.clone() for n, p in learner.model.policy.named_parameters() if not p.requires_grad}
    learn(batch, learner, 0, context)
    publish(learner.model.policy, learner.engine, 1, config, context)
    _, _, after = credited(learner, context, 1)
    assert after["ppo/logp_difference"] < 1e-5
    assert abs(after["ppo/kl"]) > 1e-6
    assert all(torch.equal(p, learner.model.policy.get_parameter(n)) for n, p in frozen.items())


def test_an_encoder_runs_once_for_the_samples_of_a_prompt(tmp_path: Path) -> None:
    options = {"rollout.samples_per_prompt": 4, "rollout.request_size": 8}
    learner, context = started(story_run(tmp_path, tiny_t5(tmp_path / "t5"), **options))
    rows: list[int] = []
    learner.model.policy.get_encoder().register_forward_hook(lambda _m, _a, o: rows.append(o[0].shape[0]))
    credited(learner, context)
    assert rows
    assert sum(rows) <= 8  # 16 samples of 4 prompts, in two micro-batches


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce++"])
def test_critic_free_siblings_learn_without_a_critic(advantage: str, tmp_path: Path) -> None:
    options = {"rollout.samples_per_prompt": 4, "ppo.advantage": advantage}
    learner, context = started(story_run(tmp_path, tiny_t5(tmp_path / "t5"), **options))
    assert learner.model.value_head is None
    before, metrics = after_learning(learner, context)
    after = weights_of(learner)
    assert "ppo/value_loss" not in metrics
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_samples_that_could_not_be_scored_are_left_out(tmp_path: Path) -> None:
    """A failing sample within its budget weighs nothing: others' numbers are as if it were not there."""
    options = {"rewards.letters.function": "tests.stories:letters_or_failure"}
    options |= {"rewards.letters.failure_budget": 16, "rewards.letters.normalize": "none"}
    learner, context = started(story_run(tmp_path, tiny_t5(tmp_path / "t5"), **options))
    judged, batch, _ = credited(learner, context)
    failed_B = judged.raw["letters"].isnan()
    assert 0 < failed_B.sum() < 16
    assert not batch.credit.policy_mask_BT[failed_B].any()
    assert not batch.credit.advantages_BT[failed_B].any()
    assert batch.credit.policy_mask_BT[~failed_B].any(1).all()
    assert torch.isfinite(torch.tensor(list(learn(batch, learner, 0, context).values()))).all()


def test_what_cannot_be_is_refused_before_it_starts(tmp_path: Path) -> None:
    policy = tiny_t5(tmp_path / "t5")
    cases: dict[str, dict[str, Any]] = {
        r"reference\.kind=.*needs policy\.lora": {"reference.kind": "adapter_off"},
        r"rollout\.samples_per_prompt=1.*at least 2": {"ppo.advantage": "grpo"},
        r"rollout\.batch_size=18.*multiple of rollout\.request_size=4": {"rollout.batch_size": 18},
        r"ppo\.mini_batch_size=5.*must divide": {"ppo.mini_batch_size": 5},
        r"ppo\.kl\.estimator='k1'.*zero on average": {"ppo.kl.place": "loss"},
        r"rewards=\{\}: name at least one": {"rewards": {}},
    }
    for message, options in cases.items():
        with pytest.raises((ConfigError, ValueError), match=message):
            story_run(tmp_path, policy, **options)


@pytest.mark.parametrize(("compat", "family"), [("trl-1.12", tiny_gpt2), ("trl-0.11", tiny_t5)])
def test_other_trainers_conventions_run_in_the_loop(compat: str, family: Any, tmp_path: Path) -> None:
    """Their arithmetic is proven in test_trl_parity; here the loop gives it what it asks for."""
    options = {"ppo.compat": compat, "ppo.micro_batch_size": 4, "critic.kind": "shared"}
    learner, context = started(story_run(tmp_path, family(tmp_path / "policy"), **options))
    _, batch, _ = credited(learner, context)
    worth, lengths = batch.credit, batch.rollouts.mask_BT.sum(1)
    if compat == "trl-1.12":
        assert batch.old_logp_BT is batch.rollouts.rollout_logp_BT
        assert batch.credit.value_mask_BT.shape[1] == learner.config.rollout.max_new_tokens
        assert torch.equal(worth.value_mask_BT.sum(1), (lengths + 1).clamp(max=6).long())
    else:
        assert torch.equal(worth.policy_mask_BT.sum(1), lengths.long() - 1)
    metrics = learn(batch, learner, 0, context)
    assert all(value == value for value in metrics.values())
