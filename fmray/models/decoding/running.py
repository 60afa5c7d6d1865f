"""Continuous batching: a question joins the answers that are being said at the next token step, a finished one leaves.

R rows  K that join  V vocabulary
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fmray.errors import DataError
from fmray.models.answering import Said
from fmray.models.decoding.choice import AnswerOptions, Choice, choose
from fmray.models.decoding.rows import Rows
from fmray.models.decoding.slots import closed_up
from fmray.models.decoding.spelling import Pieces, Spelling
from fmray.models.picture_memory import PictureMemory
from fmray.types import Dialogue, Pictures


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that joins. `Asked("chatcmpl-7", dialogue, pictures, AnswerOptions(max_new_tokens=64))`"""

    key: Hashable
    """What its tokens are called by; no two that are running may have the same."""
    dialogue: Dialogue
    """Its last turn is answered."""
    pictures: Pictures
    """The dialogue's, and perhaps others, which are not looked at. Equal keys are equal pictures, in all that ever join."""
    options: AnswerOptions


@dataclass(frozen=True, slots=True)
class Spelled:
    """A token and how likely it was. `Spelled(b" red", -0.105)`"""

    octets: bytes
    """What it stands for in a text: UTF-8, or a part of a letter."""
    logprob: float

    @property
    def text(self) -> str:
        """The same, parts of letters as `\\ufffd`."""
        return self.octets.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class Token:
    """One token of one answer. `Token("chatcmpl-7", 260, " red", Spelled(b" red", -0.1), (), None)`"""

    key: Hashable
    id: int
    text: str
    """What can be told now: whole letters, without space that may be the last. All of an answer's, joined, are `Said.text`."""
    spelled: Spelled
    alternatives: tuple[Spelled, ...]
    """The likeliest tokens, as many as were asked for."""
    finished: Literal["stop", "length", "failed"] | None
    """`stop`: this token ends it, or decides for a picture; `length`: it is cut here; `failed`: see `error`."""
    said: Said | None = None
    """The whole answer, at its last token, where it has not failed."""
    error: DataError | None = None
    """Why it failed; the others go on."""


class Speaker(Protocol):
    """What a family of models brings: how its prompts are read and its tokens put into words."""

    stops: frozenset[int]
    """Tokens that end an answer."""
    spelling: Spelling

    @property
    def rows(self) -> Rows:
        """What is being answered, in the order of beginning until somebody leaves."""
        ...

    def begin(self, asked: Sequence[Asked], pictures: Pictures) -> tuple[list[Any], Tensor]:
        """New rows: what `said` must know of each prompt, and logits of their first tokens, float32 [K, V].

        Raises DataError with the dialogue's name, before any row is there.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens, special ones left out, space around it kept."""
        ...

    def said(self, prompt: Any, ids: Sequence[int]) -> Said:
        """A finished answer."""
        ...


@dataclass(slots=True)
class _Row:
    key: Hashable
    name: str
    prompt: Any
    options: AnswerOptions
    pieces: Pieces
    ids: list[int] = field(default_factory=list)


class Running:
    """The answers that one model is saying, each the same as if it were alone (up to a product's rounding).

    One thread calls it. A call that raises has changed nothing: it can be made again, with fewer. The weights are those of when
    it was made.
    """

    def __init__(self, speaker: Speaker, pictures: PictureMemory, max_rows: int) -> None:
        self.max_rows = max_rows
        self._speaker, self._pictures = speaker, pictures
        self._rows: list[_Row] = []

    @property
    def rows(self) -> int:
        """Answers being said."""
        return len(self._rows)

    @property
    def keys(self) -> list[Hashable]:
        """What they are called by, the newest last."""
        return [row.key for row in self._rows]

    @property
    def room(self) -> int:
        """Questions that can join now."""
        return self.max_rows - len(self._rows)

    @property
    def bytes(self) -> int:
        """Memory of keys, values and remembered pictures; it follows the longest row that runs, and is free when none does."""
        return self._speaker.rows.bytes + self._pictures.bytes

    @torch.inference_mode()
    def join(self, asked: Sequence[Asked]) -> list[Token]:
        """Read questions together, and say the first token of each, in their order.

        Raises DataError that names a dialogue which cannot be read or whose answer has no room, ValueError for more than `room`
        and for a key that runs already; then none of them has joined.
        """
        keys = [each.key for each in asked]
        taken = {row.key for row in self._rows}
        if len(keys) > self.room or len(set(keys)) < len(keys) or taken & set(keys):
            raise ValueError(
                f"{len(keys)} answers cannot join {self.rows} of {self.max_rows}, or a key is taken"
            )
        if not asked:
            return []
        before, joined = len(self._rows), False
        try:
            prompts, logits_KV = self._speaker.begin(asked, self._pictures.of(asked_pictures(asked)))
            new = [
                _Row(each.key, each.dialogue.name, prompt, each.options, Pieces(self._speaker.decode))
                for each, prompt in zip(asked, prompts, strict=True)
            ]
            choices = _chosen(new, logits_KV)
            joined = True
        finally:
            if not joined:
                self._speaker.rows.keep(range(before))
        self._rows += new
        return self._tell(before, choices)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """The next token of every answer; those that it ends have left."""
        if not self._rows:
            return []
        last = [row.ids[-1] for row in self._rows]
        logits_RV = self._speaker.rows.step(self._pictures.on_device(torch.tensor(last)))
        return self._tell(0, _chosen(self._rows, logits_RV))

    @torch.inference_mode()
    def leave(self, keys: Iterable[Hashable]) -> None:
        """Nobody waits for these any more; keys that do not run are passed over."""
        gone = set(keys)
        self._keep([row.key not in gone for row in self._rows])

    def _tell(self, first: int, choices: Sequence[Choice]) -> list[Token]:
        rows = self._rows[first:]
        tokens = [self._token(row, choice) for row, choice in zip(rows, choices, strict=True)]
        self._keep([True] * first + [token.finished is None for token in tokens])
        return tokens

    def _token(self, row: _Row, choice: Choice) -> Token:
        octets = self._speaker.spelling.octets
        if not choice.finite:
            place = len(row.ids)
            error = DataError(
                f"dialogue '{row.name}': the model's numbers at answer token {place} are not finite"
            )
            return Token(row.key, choice.token, "", Spelled(b"", choice.logprob), (), "failed", error=error)
        row.ids.append(choice.token)
        stops = choice.token in self._speaker.stops
        text = "" if stops else row.pieces.add(choice.token)
        finished: Literal["stop", "length"] | None = None
        said = None
        if stops or len(row.ids) == row.options.max_new_tokens:
            finished = "stop" if stops else "length"
            text += row.pieces.end()
            said = self._speaker.said(row.prompt, row.ids)
        beside = tuple(Spelled(octets(token), logprob) for token, logprob in choice.alternatives)
        spelled = Spelled(octets(choice.token), choice.logprob)
        return Token(row.key, choice.token, text, spelled, beside, finished, said)

    def _keep(self, stay: Sequence[bool]) -> None:
        if not all(stay):
            order = closed_up(stay)
            self._speaker.rows.keep(order)
            self._rows = [self._rows[row] for row in order]


def _chosen(rows: Sequence[_Row], logits_RV: Tensor) -> list[Choice]:
    return choose(logits_RV, [row.options for row in rows], [len(row.ids) for row in rows])


def asked_pictures(asked: Sequence[Asked]) -> list[tuple[str, Pictures]]:
    """Each distinct picture that a dialogue shows, and where it is; raises DataError where one is not there."""
    found: dict[str, Pictures] = {}
    for each in asked:
        for key in each.dialogue.pictures:
            if key not in each.pictures.keys:
                raise DataError(f"dialogue '{each.dialogue.name}': its picture '{key}' was not given")
            found.setdefault(key, each.pictures)
    return list(found.items())
