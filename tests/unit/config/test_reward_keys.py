"""Rewards are named by the user and come in kinds: overrides, mistakes and help of such sections."""

from __future__ import annotations

import pytest

from fmray.config.loading import HelpRequested, load_config, merge, validate
from fmray.config.rewards import REWARD_KINDS, ClassifierReward, LengthReward
from fmray.config.rlhf import RlhfConfig
from fmray.config.shapes import kinds_of, walk
from fmray.errors import ConfigError


def recipe() -> RlhfConfig:
    """A reward model and a rule."""
    sentiment = ClassifierReward(source="somewhere", weight=0.7, clip=None, failure_budget=3)
    return RlhfConfig(rewards={"sentiment": sentiment, "length": LengthReward(min_tokens=4)})


def load(*words: str) -> RlhfConfig:
    return load_config(RlhfConfig, {"two": recipe}, ["--recipe", "two", *words], door="test")


def test_a_reward_named_like_a_kind_keeps_its_name_in_errors() -> None:
    with pytest.raises(ConfigError, match=r"^rewards\.length\.min_tokens=-1: "):
        load("rewards.length.min_tokens=-1")


def test_keys_of_one_reward_are_laid_over_a_recipes() -> None:
    rewards = load("rewards.sentiment.weight=0.2", "rewards.length.max_tokens=9").rewards
    assert rewards["sentiment"].weight == 0.2
    assert rewards["length"].model_dump() == LengthReward(min_tokens=4, max_tokens=9).model_dump()


@pytest.mark.parametrize("turned", [False, True])
def test_another_kind_keeps_what_every_kind_has_in_any_order_of_words(turned: bool) -> None:
    words = ["rewards.sentiment.kind=http", "rewards.sentiment.url=http://host/score"]
    reward = load(*(words[::-1] if turned else words)).rewards["sentiment"]
    assert (reward.kind, reward.weight, reward.clip, reward.failure_budget) == ("http", 0.7, None, 3)
    assert (
        reward.request_timeout_seconds == 30.0
    )  # and the source of the classifier is gone, or it were refused


def test_another_kind_of_prompts_replaces_its_keys() -> None:
    prompts = load("prompts.source.kind=jsonl", "prompts.source.path=here").prompts.source
    assert prompts.model_dump() == {"kind": "jsonl", "path": "here", "text_key": "prompt"}


def test_kinds_of_other_sections_only_change_a_key() -> None:
    """`runtime.kind` is a key among others, not the name of another section."""
    assert merge({"kind": "local", "workers": 1}, {"kind": "ray"}) == {"kind": "ray", "workers": 1}


@pytest.mark.parametrize(
    ("reward", "key", "message"),
    [
        (
            {"weight": 1},
            "rewards.a.kind",
            "is required; write rewards.a.kind=… with one of classifier, grammar",
        ),
        ({"kind": "lenght"}, "rewards.a.kind", "did you mean length?"),
        ({"kind": "xyzzy"}, "rewards.a.kind", ", ".join(REWARD_KINDS)),
        ({"kind": None}, "rewards.a.kind", "must be one of"),
        ("classifier", "rewards.a", "is a section of keys"),
        (None, "rewards.a", "is a section of keys"),
        ({"kind": "classifier"}, "rewards.a.source", "is required; write rewards.a.source=…"),
        ({"kind": "grammar", "sorce": "x"}, "rewards.a.sorce", "did you mean rewards.a.source?"),
        ({"kind": "grammar", "xyzzy": 1}, "rewards.a.xyzzy", "there are: weight, normalize"),
        ({"kind": "length", "pool": {"replica": 2}}, "rewards.a.pool.replica", "rewards.a.pool.replicas?"),
        ({"kind": "length", "min_tokens": 9, "max_tokens": 3}, "rewards.a.min_tokens", "max_tokens=3"),
        (
            {"kind": "classifier", "source": "x", "output": "margins"},
            "rewards.a.output",
            "did you mean margin?",
        ),
        ({"kind": "http", "url": "ftp://host"}, "rewards.a.url", "pattern"),
        ({"kind": "http", "url": "http://h", "headers": {"a": [1]}}, "rewards.a.headers.a", "string"),
        ({"kind": "python", "function": "no colon"}, "rewards.a.function", "pattern"),
    ],
)
def test_mistakes_name_the_reward_the_key_and_the_cure(reward: object, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(RlhfConfig, {"rewards": {"a": reward}})
    assert caught.value.key == key
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none_and_no_reward_at_all() -> None:
    with pytest.raises(ConfigError, match=r"rewards\.A b"):
        validate(RlhfConfig, {"rewards": {"A b": {"kind": "length"}}})
    with pytest.raises(ConfigError, match="name at least one"):
        validate(RlhfConfig, {})
    with pytest.raises(ConfigError, match="every weight is 0"):
        validate(RlhfConfig, {"rewards": {"a": {"kind": "length", "weight": 0}}})


def test_a_section_that_may_be_absent_is_walked_like_any_other() -> None:
    with pytest.raises(
        ConfigError, match=r"^policy\.lora\.rnk=4: unknown key; did you mean policy\.lora\.rank\?"
    ):
        validate(RlhfConfig, {"policy": {"lora": {"rnk": 4}}, "rewards": {"a": {"kind": "length"}}})


def test_a_location_leads_to_the_key_and_its_annotation() -> None:
    path, annotation = walk(RlhfConfig, ("rewards", "length", "length", "min_tokens"))
    assert path == ["rewards", "length", "min_tokens"]
    assert annotation is not None
    assert tuple(kinds_of(walk(RlhfConfig, ("rewards", "x"))[1])) == REWARD_KINDS


def test_help_tells_each_kind_and_the_roots_own_defaults() -> None:
    with pytest.raises(HelpRequested) as caught:
        load("--help")
    lines = str(caught.value).splitlines()
    for kind in REWARD_KINDS:
        assert sum(line.startswith(f"  rewards.<reward>.kind={kind} ") for line in lines) == 1
    for key in ("weight", "clip", "failure_budget"):  # what all kinds have is told once
        assert sum(line.startswith(f"  rewards.<reward>.{key} ") for line in lines) == 1
    assert "  optimizer.lr  (float; default 1e-05)" in lines  # the pretraining's own default is another
    assert '  run.name  (str; default "rlhf")' in lines
    assert "  policy.lora.rank  (int; default 16)" in lines
    assert "  rewards.<reward>.source  (str; required)" in lines
    assert "  rollout.pool.…  the keys of reference.pool" in lines
    assert lines.count("  rewards.<reward>.pool.…  the keys of reference.pool with {replicas: 0}") == 3
