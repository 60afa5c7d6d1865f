"""What the policy is asked: prompts as text, their order over epochs, and their cut to a number of tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fmray.config.prompts import (
    HubPromptSource,
    JsonlPromptSource,
    PromptConfig,
    QuestionPromptSource,
    ReviewPromptSource,
)
from fmray.data.dialogues import DialogueSource, open_dialogues
from fmray.data.loader import epoch_order
from fmray.data.reviews import Review, folded, load_reviews, text_hash
from fmray.data.sources import Split, data_folder, some
from fmray.errors import DataError
from fmray.types import Dialogue


@dataclass(frozen=True, slots=True)
class Prompt:
    """`Prompt(index=7, text="The first half of this")`; a question about a picture is a dialogue too."""

    index: int
    """Its position in the split."""
    text: str
    """With the template around it."""
    dialogue: Dialogue | None = None
    """The question with its picture's key and the answers that people gave."""
    source: DialogueSource | None = field(default=None, repr=False, compare=False)
    """Where its picture is read."""

    @property
    def picture(self) -> str | None:
        """The key of its picture."""
        return self.dialogue.pictures[0] if self.dialogue is not None else None

    @property
    def answers(self) -> tuple[str, ...] | None:
        """What may be said to it, as far as that is known: empty where nothing is; None for a prompt that asks nothing."""
        if self.dialogue is None:
            return None
        said = self.dialogue.turns[-1].answer
        return self.dialogue.answers or ((said,) if said else ())


def open_prompts(config: PromptConfig, split: Split) -> tuple[Prompt, ...]:
    """The prompts of one split, at least one. Raises DataError, which names an empty prompt; AssetError."""
    if isinstance(config.source, QuestionPromptSource):
        return question_prompts(config.source, split)[: config.max_prompts]
    texts = tuple(_texts(config.source, split))[: config.max_prompts]
    if not texts:
        raise DataError(f"prompts.source: the {split} split of kind={config.source.kind} has no prompts")
    return tuple(Prompt(index, config.template.replace("{}", text)) for index, text in enumerate(texts))


def _texts(source: ReviewPromptSource | JsonlPromptSource | HubPromptSource, split: Split) -> Iterable[str]:
    if isinstance(source, ReviewPromptSource):
        return review_prompts(source, split)
    return (
        jsonl_prompts(source, split) if isinstance(source, JsonlPromptSource) else hub_prompts(source, split)
    )


# ------------------------------------------------------------------------------------------ movie reviews

_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]]*(?=\s)|[。！？]")
_NATURAL = re.compile(r"[\"'“‘(]?[^\W_]+(?:['’.&-][^\W_]+)*[\"'”’)]?[,;:]?|[–—-]+")
"""A word that somebody would say: no address, no star rating, no word_with_underscores."""


def review_prompts(source: ReviewPromptSource, split: Split) -> tuple[str, ...]:
    """The first words of the reviews' first sentences, each once, in an order that mixes sources and sentiments.

    A sentence is always broken off, so that there is something to say after it. No test prompt is also a
    training prompt. Raises AssetError.
    """
    prompts = _openings(load_reviews(split, source.source), source.words)
    if split == "test":
        trained_on = _openings(load_reviews("train", source.source), source.words)
        prompts = {key: text for key, text in prompts.items() if key not in trained_on}
    return tuple(prompts.values())


def _openings(reviews: Iterable[Review], words: tuple[int, int]) -> dict[str, str]:
    """Prompts by their folded text, in the order of their reviews' hashes."""
    prompts: dict[str, str] = {}
    low, high = words
    hashed = [(text_hash(review.text), review) for review in reviews]
    for drawn, review in sorted(hashed, key=itemgetter(0)):
        sentence = first_sentence(review).split()
        count = min(low + drawn % (high - low + 1), len(sentence) - 1)
        opening = sentence[:count]
        text = " ".join(opening)
        if count >= low and not text.isupper() and all(map(_NATURAL.fullmatch, opening)):
            prompts.setdefault(folded(text), text)
    return prompts


def first_sentence(review: Review) -> str:
    """The review up to the end of its first sentence or line; Rotten Tomatoes' spaced-out marks are joined again.

    `a date , but it's ( nearly ) worth it .` becomes `a date, but it's (nearly) worth it.`
    """
    text = review.text.partition("\n")[0]
    if review.source == "rotten_tomatoes":
        text = re.sub(r" (?=[,;:.!?)\]])|(?<=[(\[]) ", "", text)
    end = _SENTENCE_END.search(text)
    return text[: end.end()] if end else text


# ------------------------------------------------------------------------------------------ your own


def jsonl_prompts(source: JsonlPromptSource, split: Split) -> tuple[str, ...]:
    """One prompt per line of `<path>/<split>.jsonl`; raises DataError with file and line."""
    from fmray.data.files import json_lines, json_value

    listing = data_folder(source.path, "prompts.source.path") / f"{split}.jsonl"
    rows = json_lines(listing, "prompts.source.path")
    places = ((f"{listing}:{number}", row) for number, row in rows)
    return tuple(_prompt_text(json_value(row, source.text_key, where), where) for where, row in places)


def hub_prompts(source: HubPromptSource, split: Split) -> tuple[str, ...]:
    """One prompt per row of a hub dataset's column; raises DataError with the row."""
    from fmray.data.hub import load_split

    wanted = source.train_split if split == "train" else source.test_split
    rows = load_split(source.path, source.config_name, wanted, key="prompts.source.path")
    if source.column not in rows.column_names:
        columns = some(sorted(rows.column_names), 12)
        raise DataError(
            f"prompts.source.column={source.column!r}: {source.path} has no such column; there are {columns}"
        )
    name = f"{source.path}[{wanted}]"
    return tuple(_prompt_text(value, f"{name}#{row}") for row, value in enumerate(rows[source.column]))


def _prompt_text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: the prompt must be a string, not {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: the prompt is empty")
    return value


# ------------------------------------------------------------------------------------------ questions about pictures


def question_prompts(source: QuestionPromptSource, split: Split) -> tuple[Prompt, ...]:
    """The questions of one split in the order of their names' hashes, so that its beginning is a sample of it.

    Raises DataError for a question of no picture or of several, by its name.
    """
    dialogues = open_dialogues(source.dialogues, split)
    found = []
    for dialogue in (dialogues[index] for index in range(len(dialogues))):
        if len(dialogue.pictures) != 1:
            cure = "a prompt has one; leave it out"
            raise DataError(f"dialogue '{dialogue.name}': has {len(dialogue.pictures)} pictures, {cure}")
        found.append(dialogue)
    found.sort(key=lambda dialogue: text_hash(dialogue.name))
    return tuple(
        Prompt(index, dialogue.question, dialogue, dialogues) for index, dialogue in enumerate(found)
    )


# ------------------------------------------------------------------------------------------ tokens


class PromptTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that `fit_prompt` uses."""

    def __call__(self, text: str) -> Any: ...


_CUTS = (re.compile(r"\S(?=[^\S\n]*\n)"), _SENTENCE_END, re.compile(r"\S(?=\s|$)"))
"""Where a text may end, best first: before a line end, after a sentence, after a word."""


def fit_prompt(text: str, tokenizer: PromptTokenizer, max_tokens: int, ending: str = "") -> list[int]:
    """Token ids of a prompt, special tokens among them, at most `max_tokens`; a longer one loses its end.

    It is cut at its last line end that fits, else at its last sentence end, but not where that would leave half of the room
    unused: then after the last word that fits. `ending`: the template's part behind the prompt, which is kept.
    Raises DataError for a prompt without text and for one whose first word does not fit.
    """
    body = text.removesuffix(ending)
    if not body.strip():
        raise DataError(f"prompt {text!r}: is empty")

    def ids(end: int) -> list[int]:
        return list(tokenizer(body[:end] + ending)["input_ids"])

    whole = ids(len(body))
    if len(whole) <= max_tokens:
        return whole
    for cut in _CUTS:
        ends = [match.end() for match in cut.finditer(body)]
        fitting = bisect_right(ends, max_tokens, key=lambda end: len(ids(end)))
        kept = ids(ends[fitting - 1]) if fitting else []
        if kept and (len(kept) > max_tokens // 2 or cut is _CUTS[-1]):
            return kept
    start = text if len(text) <= 40 else f"{text[:40]}…"
    raise DataError(f"prompt {start!r}: no whole word of it fits into prompts.max_tokens={max_tokens}")


# ------------------------------------------------------------------------------------------ order


@dataclass(frozen=True, slots=True)
class PromptOrder:
    """Which prompt stands where in an endless stream: one permutation of all prompts after the other.

    `PromptOrder(count=5, seed=0).indices(3, 8)`: a function of seed and position alone, so a run resumes anywhere.
    """

    count: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise DataError(f"an order over {self.count} prompts: there must be at least one")

    def __getitem__(self, position: int) -> int:
        """Index of the prompt at a position, from 0 on."""
        epoch, place = divmod(position, self.count)
        return int(_permutation(self.count, self.seed, epoch)[place])

    def indices(self, start: int, stop: int) -> list[int]:
        """Indices at positions start..stop-1."""
        return [self[position] for position in range(start, stop)]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return epoch_order(count, seed, epoch)
