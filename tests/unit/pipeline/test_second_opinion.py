"""Second judges: paired changes in closed form, the same answers for every judge, reviews that the reward model never saw."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fmray.config.demo import SecondOpinionConfig
from fmray.config.reward import JsonlVerdicts, RewardDataConfig, RewardModelConfig
from fmray.config.reward_recipes import reward_sentiment
from fmray.config.rewards import CallableReward, LikelihoodReward
from fmray.data.reviews import load_reviews
from fmray.data.verdicts import open_verdicts
from fmray.errors import DataError
from fmray.evaluation.sentiment_judges import accuracy
from fmray.pipeline.second_opinion import (
    Answers,
    change,
    grammar_opinion,
    last_words,
    read_answers,
    second_opinions,
    sentiment_judges,
    unseen_imdb,
)
from fmray.runtime.run_folder import RunFolder
from tests.stories import letter_share, tiny_gpt2

CPU = torch.device("cpu")


def answers(version: int, *responses: str) -> Answers:
    prompts = tuple(f"prompt {number}" for number in range(len(responses)))
    return Answers(version, prompts, responses, {})


def test_a_change_is_of_pairs_and_leaves_out_what_either_lacks() -> None:
    before_N = torch.tensor([0.0, 1.0, 2.0, math.nan, 5.0])
    after_N = torch.tensor([1.0, 1.0, 4.0, 9.0, math.nan])
    found = change(before_N, after_N)
    assert (found.before, found.after, found.difference) == (1.0, 2.0, 1.0)
    assert found.error == pytest.approx(math.sqrt(((1 - 1) ** 2 + (0 - 1) ** 2 + (2 - 1) ** 2) / 2 / 3))
    assert math.isnan(change(torch.tensor([1.0]), torch.tensor([2.0])).error)


def test_answers_are_read_as_the_run_wrote_them(tmp_path: Path) -> None:
    rows = [
        {"prompt": "A", "response": "é", "letters": 0.5},
        {"prompt": "B", "response": "", "letters": math.nan},
    ]
    (tmp_path / "held_out").mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "held_out" / "version-00000012.jsonl").write_text(lines, encoding="utf-8")
    found = read_answers(RunFolder(str(tmp_path)), 12)
    assert (found.prompts, found.responses) == (("A", "B"), ("é", ""))
    assert found.raw["letters"][0] == 0.5
    assert found.raw["letters"][1].isnan()
    with pytest.raises(DataError, match="version-00000013"):
        read_answers(RunFolder(str(tmp_path)), 13)


def test_any_reward_can_judge_grammar() -> None:
    judge = CallableReward(function="tests.stories:letter_share")
    found = grammar_opinion(judge, answers(0, "xyz", "bcd"), answers(3, "aei", "bca"), CPU)
    expected = letter_share(["aei", "bca"], [])
    torch.testing.assert_close(found.after_N, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.before_N.tolist() == [0.0, 0.0]
    assert found.beside == "grammar"


def test_likelihood_says_which_text_is_likelier(tmp_path: Path) -> None:
    judge = LikelihoodReward(source=str(tiny_gpt2(tmp_path / "gpt2")), max_tokens=64)
    found = grammar_opinion(judge, answers(0, "the dog", ""), answers(1, "the dog", "a cat"), CPU)
    assert found.before_N[0] == found.after_N[0]
    assert found.before_N[1] == pytest.approx(-math.log(128))


def test_answers_to_other_prompts_are_refused() -> None:
    mine = answers(0, "a", "b")
    with pytest.raises(DataError, match="different held-out prompts"):
        second_opinions(SecondOpinionConfig(), RewardModelConfig(), mine, answers(1, "a"), CPU)


@pytest.mark.assets
def test_counted_reviews_are_none_of_the_reward_models() -> None:
    trained = reward_sentiment()
    unseen = unseen_imdb(trained)
    everything = load_reviews("train", "imdb")
    assert len(everything) - len(unseen) == trained.data.source.imdb  # type: ignore[union-attr]
    pieces = {verdict.texts[0] for verdict in open_verdicts(trained.data).train}
    assert not any(
        review.text.endswith(piece) for review in unseen[:40] for piece in pieces if len(piece) > 60
    )
    share = sum(review.label for review in unseen[:2000]) / 2000
    assert 0.45 < share < 0.55
    own = RewardModelConfig(data=RewardDataConfig(source=JsonlVerdicts(path="x")))
    assert len(unseen_imdb(own)) == len(everything)


@pytest.mark.slow
@pytest.mark.assets
def test_both_judges_of_sentiment_are_worth_asking() -> None:
    test = load_reviews("test", "rotten_tomatoes")[:600] + load_reviews("test", "imdb")[:400]
    texts, labels = [last_words(review) for review in test], [review.label for review in test]
    config = SecondOpinionConfig(probe_reviews=1000, counted_reviews=6000)
    found = [accuracy(judge, texts, labels) for judge in sentiment_judges(config, reward_sentiment(), CPU)]
    assert len(found) == 2
    assert min(found) > 0.66
    assert max(found) > 0.7
