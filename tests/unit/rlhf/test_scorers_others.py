"""Rewards that are somebody's function: what it returns, what it raises, where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fmray.config.rewards import CallableReward
from fmray.errors import ConfigError
from fmray.rlhf.scorers import build_scorer
from tests.unit.rlhf.answers import answers
from tests.unit.rlhf.judges import HERE

MODULE = """
import numpy, torch
class OwnError(Exception): pass
calls = []
not_a_function = 3
def length(texts, prompts):
    calls.append((list(texts), list(prompts)))
    texts.clear()
    return [float(len(prompt)) for prompt in prompts]
def array(texts, prompts): return numpy.array([len(t) for t in texts], dtype=numpy.float32)
def tensor(texts, prompts): return torch.tensor([len(t) for t in texts])
def tensors(texts, prompts): return [torch.tensor(len(t) / 2) for t in texts]
def fewer(texts, prompts): return [1.0]
def nothing(texts, prompts): return None
def lazily(texts, prompts): return (len(t) for t in texts)
def strange(texts, prompts): return [1.0, float("nan"), "good"]
def picky(texts, prompts):
    if any("bad" in t for t in texts): raise OwnError("cannot read\\nthis")
    return [1.0 for _ in texts]
def interrupted(texts, prompts): raise KeyboardInterrupt
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return "my_rewards"


def scores(function: str, *texts: str, **keys: object):  # type: ignore[no-untyped-def]
    config = CallableReward.model_validate({"function": function, **keys})
    return build_scorer(config, HERE).score(answers(texts, prompts=["ask me"] * len(texts)))


def test_a_function_gets_texts_and_prompts_once(module: str) -> None:
    found = scores(f"{module}:length", "so", "so on", text="prompt_and_response")
    assert found.raw_B.tolist() == [6.0, 6.0]
    assert sys.modules[module].calls == [(["ask me so", "ask me so on"], ["ask me", "ask me"])]


@pytest.mark.parametrize(
    ("function", "expected"), [("array", [2, 5]), ("tensor", [2, 5]), ("tensors", [1, 2.5])]
)
def test_arrays_and_tensors_are_numbers(module: str, function: str, expected: list[float]) -> None:
    found = scores(f"{module}:{function}", "so", "so on")
    assert found.raw_B.tolist() == expected
    assert found.failures == ()


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("fewer", "there are 1 scores for 2 texts"),
        ("nothing", "the scores are None, not a list of 2 numbers"),
        ("lazily", "the scores are <generator"),
    ],
)
def test_what_is_no_list_of_as_many_numbers_fails_every_sample(module: str, function: str, line: str) -> None:
    found = scores(f"{module}:{function}", "so", "so on")
    assert found.raw_B.isnan().all()
    assert len(found.failures) == 2
    assert line in found.failures[0]


def test_single_scores_that_are_no_numbers_fail_their_samples(module: str) -> None:
    found = scores(f"{module}:strange", "a", "b", "c")
    assert found.raw_B.isnan().tolist() == [False, True, True]
    assert "its score is nan, not a finite number" in found.failures[0]
    assert "its score is 'good', not a number" in found.failures[1]


def test_only_the_sample_that_makes_it_raise_fails_whatever_it_raises(module: str) -> None:
    found = scores(f"{module}:picky", "fine", "a bad one", "fine too")
    assert torch.equal(found.raw_B.isnan(), torch.tensor([False, True, False]))
    (line,) = found.failures
    assert (
        line
        == "sample 61 (prompt 'ask me', response 'a bad one'): the function raised OwnError: cannot read this"
    )


def test_an_interrupt_is_no_failure_of_a_sample(module: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        scores(f"{module}:interrupted", "a", "b")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards:lenght", "did you mean my_rewards:length?"),
        ("my_rewards:not_a_function", "is not a function"),
        ("no_such_module:score", "PYTHONPATH"),
        ("needs_more:score", "a_package_that_is_not_there"),
    ],
)
def test_a_function_that_is_not_there_is_a_config_error(module: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.\*\.function") as caught:
        build_scorer(CallableReward(function=path), HERE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
