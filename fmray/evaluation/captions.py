"""Captions measured: BLEU-4 of what was said, and whether the right caption is the likeliest among some.

R pictures of a block  C its captions (C = R): each picture is scored against each caption of its block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fmray.errors import DataError, require_package
from fmray.evaluation.retrieval import slices
from fmray.models.answering import Answering
from fmray.runtime.context import Context
from fmray.types import Dialogue, Metrics, Pictures

RULES = ("sum", "mean", "pmi")
"""Σ log p; Σ log p over its tokens; Σ log p minus that of the same caption under a blank picture."""
BLANK = "\0blank"
"""Key of the blank picture: no file is called so."""
GREY = 128

ReadPictures = Callable[[tuple[str, ...]], Pictures]
"""Some pictures, decoded."""


def bleu(said: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, str]:
    """BLEU-4 of a corpus, 0..100, in lower case, and sacrebleu's signature (Post 2018), without which it means little.

    A caption may have any number of references. Where no caption has four words there is no 4-gram, and BLEU-4 is 0.
    Raises MissingExtra.
    """
    require_package("sacrebleu", "evaluate", "BLEU of captions")
    from sacrebleu.metrics.bleu import BLEU

    most = max(len(texts) for texts in references)
    columns: Any = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    metric = BLEU(lowercase=True)
    score = float(metric.corpus_score(list(said), columns).score)
    return score, str(metric.get_signature())


# ------------------------------------------------------------------------------------------------ likelihood ranking


@dataclass(slots=True)
class Block:
    """Dialogues whose captions are each other's wrong choices: none is right for another's picture.

    `Block([4, 0, 7, 1], counted=3)`: the last one only lends its caption.
    """

    members: list[int] = field(default_factory=list)
    """Places among the dialogues."""
    counted: int = 0
    """So many of them are measured, the first ones."""
    _captions: set[str] = field(default_factory=set)
    _right: set[str] = field(default_factory=set)
    _pictures: set[str] = field(default_factory=set)

    def takes(self, dialogue: Dialogue) -> bool:
        """Whether its caption is wrong for every picture here, and every caption here for its picture."""
        return (
            fold(caption(dialogue)) not in self._right
            and self._captions.isdisjoint(right_captions(dialogue))
            and self._pictures.isdisjoint(dialogue.pictures)
        )

    def add(self, place: int, dialogue: Dialogue, *, counted: bool) -> None:
        """Take one in."""
        self.members.append(place)
        self.counted += counted
        self._captions.add(fold(caption(dialogue)))
        self._right |= right_captions(dialogue)
        self._pictures |= set(dialogue.pictures)


def caption(dialogue: Dialogue) -> str:
    """What is to be said: the last turn's answer."""
    return dialogue.turns[-1].answer


def right_captions(dialogue: Dialogue) -> set[str]:
    """All captions of its picture, folded."""
    return {fold(text) for text in (caption(dialogue), *dialogue.answers)}


def fold(text: str) -> str:
    """Lower case, single spaces."""
    return " ".join(text.casefold().split())


def caption_blocks(dialogues: Sequence[Dialogue], choices: int, seed: int) -> list[Block]:
    """Blocks of `choices` dialogues, drawn by the seed; every dialogue counts in one of them.

    Raises DataError where a dialogue finds no `choices` - 1 captions that are wrong for its picture.
    """
    order = torch.randperm(len(dialogues), generator=torch.Generator().manual_seed(seed)).tolist()
    full: list[Block] = []
    unfilled: list[Block] = []
    for place in order:
        block = next((block for block in unfilled if block.takes(dialogues[place])), None)
        if block is None:
            unfilled.append(block := Block())
        block.add(place, dialogues[place], counted=True)
        if len(block.members) == choices:
            unfilled.remove(block)
            full.append(block)
    for block in unfilled:
        for place in order:
            if len(block.members) < choices and block.takes(dialogues[place]):
                block.add(place, dialogues[place], counted=False)
        if len(block.members) < choices:
            name, others = dialogues[block.members[0]].name, len(block.members) - 1
            raise DataError(
                f"evaluate.choices={choices}: {name} finds only {others} captions that are wrong for its picture; take fewer"
            )
    return full + unfilled


def rank_by_likelihood(
    answering: Answering,
    dialogues: Sequence[Dialogue],
    read: ReadPictures,
    choices: int,
    seed: int,
    context: Context,
    *,
    batch_size: int = 64,
) -> Metrics:
    """Shares of dialogues whose caption is the likeliest of `choices`: `rank/sum`, `rank/mean`, `rank/pmi`.

    The candidates of a dialogue are its block's captions, so choices² likelihoods rank `choices` dialogues. The
    difference to a blank picture (pointwise mutual information) takes off what a caption is worth by itself: common
    words win by sum, long captions by mean. A tie is not right: a model that says the same to everything gets 0;
    chance is 1 / choices. Blocks are dealt to ranks whole; every rank gets the same numbers.
    """
    blocks = caption_blocks(dialogues, choices, seed)
    hits = torch.zeros(len(RULES), dtype=torch.float64, device=context.device)
    for block in blocks[context.rank :: context.world_size]:
        members = [dialogues[place] for place in block.members]
        keys = tuple(dict.fromkeys(key for member in members for key in member.pictures))
        scores = block_scores(answering, members, read(keys), batch_size)
        hits += torch.stack([first_choices(score_RC)[: block.counted].sum() for score_RC in scores]).to(hits)
    shares = (context.sum(hits) / len(dialogues)).tolist()
    return {f"rank/{rule}": share for rule, share in zip(RULES, shares, strict=True)}


def block_scores(
    answering: Answering, members: Sequence[Dialogue], pictures: Pictures, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Each picture with each caption by the three rules, float64 [R, C] on the CPU."""
    captions = [caption(member) for member in members]
    crossed = [saying(member, text) for member in members for text in captions]
    sum_RC, tokens_RC = (
        values.view(len(members), len(members))
        for values in likelihoods(answering, crossed, pictures, batch_size)
    )
    alone = [replace(member, pictures=(BLANK,) * len(member.pictures)) for member in members]
    prior_C, _ = likelihoods(answering, alone, blank_picture(answering.image.size), batch_size)
    return sum_RC, sum_RC / tokens_RC, sum_RC - prior_C


def likelihoods(
    answering: Answering, dialogues: Sequence[Dialogue], pictures: Pictures, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Σ log p and tokens of each answer, float64 [B] on the CPU; only the pictures of a part go with it."""
    sums, tokens = [], []
    for part in slices(len(dialogues), batch_size):
        chosen = dialogues[part]
        found = answering.likelihood(chosen, some_pictures(pictures, chosen))
        sums.append(found[0].double().cpu())
        tokens.append(found[1].double().cpu())
    return torch.cat(sums), torch.cat(tokens)


def some_pictures(pictures: Pictures, dialogues: Sequence[Dialogue]) -> Pictures:
    """Those that the dialogues name, in their order."""
    keys = tuple(dict.fromkeys(key for dialogue in dialogues for key in dialogue.pictures))
    rows = pictures.rows(keys)
    pixels, features = (
        None if t is None or not rows else t[rows] for t in (pictures.pixels_NCHW, pictures.features_NPF)
    )
    return Pictures(keys, pixels, features)


def saying(dialogue: Dialogue, text: str) -> Dialogue:
    """The same dialogue with another caption."""
    return replace(
        dialogue, turns=(*dialogue.turns[:-1], replace(dialogue.turns[-1], answer=text)), answers=()
    )


def blank_picture(size: int) -> Pictures:
    """A grey square, under `BLANK`."""
    return Pictures((BLANK,), pixels_NCHW=torch.full((1, 3, size, size), GREY, dtype=torch.uint8))


def first_choices(score_RC: Tensor) -> Tensor:
    """Whether each picture's own caption, on the diagonal, is above all others: bool [R]."""
    own_R = score_RC.diagonal()
    rest_RC = score_RC.masked_fill(torch.eye(len(score_RC), dtype=torch.bool), -torch.inf)
    return own_R > rest_RC.amax(dim=1)
