"""BLEU beside sacrebleu's known numbers; ranking by likelihood with a table of likelihoods and with a real tiny model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fmray.config.schema import ImageConfig
from fmray.errors import DataError
from fmray.evaluation.captions import (
    BLANK,
    Block,
    ReadPictures,
    bleu,
    block_scores,
    caption,
    caption_blocks,
    first_choices,
    rank_by_likelihood,
)
from fmray.types import Dialogue, Metrics, Pictures, Turn
from tests.tiny_vqa import asked, tiny_vqa
from tests.unit.evaluation.contexts import context
from tests.workers import run_workers

SIDE = 16
CAPTIONS = [
    "red circle",
    "red square",
    "blue circle",
    "green triangle",
    "blue",
    "two left",
    "right",
    "one red square",
]


def captioned(count: int = 8) -> list[Dialogue]:
    return [asked(f"d{i}", f"{i}.png", "", CAPTIONS[i % len(CAPTIONS)]) for i in range(count)]


def read(keys: tuple[str, ...]) -> Pictures:
    """Each picture a function of its key alone."""
    draws = [torch.Generator().manual_seed(int(key.removesuffix(".png"))) for key in keys]
    pixels = [torch.randint(0, 256, (3, SIDE, SIDE), generator=draw, dtype=torch.uint8) for draw in draws]
    return Pictures(keys, torch.stack(pixels))


class Table:
    """Log-probabilities by (picture, caption); only what ranking asks of a model."""

    image = ImageConfig(size=SIDE)

    def __init__(self, logs: dict[tuple[str, str], float], tokens: dict[str, int]) -> None:
        self.logs, self.tokens = logs, tokens
        self.asked: list[tuple[str, str]] = []

    def likelihood(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> tuple[Tensor, Tensor]:
        for dialogue in dialogues:
            assert set(dialogue.pictures) <= set(pictures.keys)
        pairs = [(dialogue.pictures[0], caption(dialogue)) for dialogue in dialogues]
        self.asked += pairs
        sums = torch.tensor([self.logs[pair] for pair in pairs])
        return sums, torch.tensor([self.tokens[text] for _, text in pairs])


def rank(model: object, dialogues: Sequence[Dialogue], choices: int, read: ReadPictures = read) -> Metrics:
    return rank_by_likelihood(model, dialogues, read, choices, 0, context())  # type: ignore[arg-type]


def test_the_three_rules_disagree_as_they_should() -> None:
    """`short` is likely everywhere, `a long one` has many tokens: each rule is misled by something else."""
    dialogues = [asked("d0", "0.png", "", "short"), asked("d1", "1.png", "", "a long one")]
    logs = {
        ("0.png", "short"): -2.0,
        ("0.png", "a long one"): -6.0,
        ("1.png", "short"): -3.0,
        ("1.png", "a long one"): -4.0,
        (BLANK, "short"): -2.5,
        (BLANK, "a long one"): -6.5,
    }
    model = Table(logs, {"short": 1, "a long one": 4})
    by_sum, by_mean, by_pmi = block_scores(model, dialogues, read(("0.png", "1.png")), 3)  # type: ignore[arg-type]
    assert by_sum.tolist() == [[-2, -6], [-3, -4]]
    assert by_mean.tolist() == [[-2, -1.5], [-3, -1]]
    assert by_pmi.tolist() == [[0.5, 0.5], [-0.5, 2.5]]
    # sum: short wins both; mean: the long one wins both; pmi: a tie, which is not right, and a win
    assert rank(model, dialogues, 2) == {"rank/sum": 0.5, "rank/mean": 0.5, "rank/pmi": 0.5}


def test_each_picture_meets_each_caption_of_its_block_once_and_the_blank_one() -> None:
    dialogues = captioned()
    logs = {(key, text): -1.0 for key in [BLANK, *(f"{i}.png" for i in range(8))] for text in CAPTIONS}
    for i, text in enumerate(CAPTIONS):
        logs[(f"{i}.png", text)] = -0.5
    model = Table(logs, dict.fromkeys(CAPTIONS, 2))
    assert rank(model, dialogues, 4) == {"rank/sum": 1.0, "rank/mean": 1.0, "rank/pmi": 1.0}
    assert len(model.asked) == 2 * (4 * 4 + 4)
    assert len(set(model.asked)) == len(model.asked)
    for i, text in enumerate(CAPTIONS):
        logs[(f"{i}.png", text)] = -1.5
    assert set(rank(model, dialogues, 4).values()) == {0.0}


def test_a_model_that_says_the_same_to_all_is_never_right() -> None:
    assert not first_choices(torch.zeros(3, 3)).any()
    assert not first_choices(torch.full((2, 2), torch.nan)).any()
    assert first_choices(torch.tensor([[1.0, 0.0], [3.0, 2.0]])).tolist() == [True, False]


@given(st.integers(2, 6), st.lists(st.integers(0, 9), min_size=12, max_size=40), st.integers(0, 3))
def test_blocks_hold_wrong_captions_only_and_count_everyone_once(
    choices: int, drawn: list[int], seed: int
) -> None:
    drawn = [*range(10), *drawn]
    dialogues = [asked(f"d{i}", f"{i}.png", "", f"caption {number}") for i, number in enumerate(drawn)]
    blocks = caption_blocks(dialogues, choices, seed)
    counted = [place for block in blocks for place in block.members[: block.counted]]
    assert sorted(counted) == list(range(len(dialogues)))
    for block in blocks:
        members = [dialogues[place] for place in block.members]
        assert len(members) == choices
        assert len({caption(member) for member in members}) == choices
        assert len({member.pictures for member in members}) == choices
    assert caption_blocks(dialogues, choices, seed) == blocks


def test_another_caption_of_the_same_picture_is_no_wrong_choice() -> None:
    turn = Turn(("", ""), "a dog")
    first = Dialogue("first", ("0.png",), (turn,), answers=("a dog", "A Puppy"))
    block = Block()
    block.add(0, first, counted=True)
    assert not block.takes(asked("x", "1.png", "", "a  puppy"))
    assert not block.takes(asked("x", "0.png", "", "a cat"))
    assert not block.takes(Dialogue("x", ("1.png",), (Turn(("", ""), "hound"),), answers=("hound", "a dog")))
    assert block.takes(asked("x", "1.png", "", "a cat"))


def test_too_few_captions_are_one_line() -> None:
    wanted = r"^evaluate\.choices=4: d\d finds only 2 captions that are wrong for its picture; take fewer$"
    with pytest.raises(DataError, match=wanted):
        caption_blocks(captioned(3), 4, 0)


# ------------------------------------------------------------------------------------------------- with a real model


def test_a_real_models_scores_do_not_depend_on_what_is_scored_together() -> None:
    model, dialogues = tiny_vqa(), captioned(5)
    keys = tuple(f"{i}.png" for i in range(5))
    together = block_scores(model, dialogues, read(keys), 25)
    apart = block_scores(model, dialogues, read(keys), 4)
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    total, tokens = model.likelihood([dialogues[2]], read(("2.png",)))
    assert float(together[0][2, 2]) == pytest.approx(float(total[0]), abs=1e-4)
    assert float(together[1][2, 2]) == pytest.approx(float(total[0] / tokens[0]), abs=1e-4)


def on_a_rank(rank: int, world_size: int) -> Metrics:
    torch.manual_seed(0)
    return rank_by_likelihood(tiny_vqa(), captioned(), read, 3, 0, context(rank, world_size), batch_size=4)


@pytest.mark.slow
def test_two_ranks_find_what_one_finds() -> None:
    alone = on_a_rank(0, 1)
    assert run_workers(2, on_a_rank) == [alone, alone]


# --------------------------------------------------------------------------------------------------------------- BLEU


def test_bleu_is_the_geometric_mean_of_four_precisions() -> None:
    score, signature = bleu(["a red dog runs home now"], [["a red dog runs away now"]])
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 fours
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-6)
    assert "case:lc" in signature
    assert "version:" in signature


def test_bleu_takes_any_number_of_references_and_folds_case() -> None:
    known = [["a small red dog runs", "One little dog is running"], ["the blue bird sings well"]]
    assert bleu(["One little dog is running", "The Blue bird sings well"], known)[0] == pytest.approx(100)
    one_sided = bleu(["One little dog is running", "nothing of the kind at all"], known)[0]
    assert 0 < one_sided < 100


def test_bleu_of_short_captions_has_no_fourth_precision() -> None:
    assert bleu(["red dog"], [["red dog"]])[0] == 0.0
