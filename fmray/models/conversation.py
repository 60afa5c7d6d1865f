"""Dialogues as spans of tokens: a chat template rendered so that nothing that people wrote can be taken for a part of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from fmray.errors import ConfigError, DataError
from fmray.types import Dialogue, Turn

Template = Literal["chat", "plain"]

OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around a slot's number: no template writes them, none trims them."""
SLOT = re.compile(f"{OPEN}(\\d+){CLOSE}")
LONGEST_KEPT = 256
"""Texts of more characters and layouts of more slots are not remembered: strangers may choose them, and memory is bounded."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one kind, in their order. `Span((523, 11), learns=True, turn=0)`: an answer, or its end."""

    ids: tuple[int, ...]
    """Token ids; a picture's are placeholders, and none where pictures do not stand in the sequence."""
    learns: bool = False
    """Whether the model should learn to say it."""
    picture: str | None = None
    """The key of the picture that stands here."""
    turn: int = -1
    """The exchange that a learning span belongs to; -1 elsewhere."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """What is filled in: the system message, a text of a question, a picture behind one, or an answer."""

    kind: Literal["system", "text", "picture", "answer"]
    turn: int = -1
    part: int = 0


@dataclass(frozen=True, slots=True)
class _Said:
    """What the template says; its first `learned` tokens end an answer."""

    ids: tuple[int, ...]
    learned: int = 0
    turn: int = -1


class Renderer:
    """A tokenizer and its template, made ready for many dialogues.

    The template is rendered once per shape of a dialogue, with marks where the contents stand, and cut at the marks. Its own
    pieces are read with special tokens; what people wrote is read without, so that `<|im_end|>` in a question is nine
    characters and neither ends a turn nor begins one. Raises ConfigError for a template that cannot be cut like this.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        picture_tokens: int,
        picture_id: int,
        routing_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.picture_tokens, self.picture_id = picture_tokens, picture_id
        self.routing_ids = tuple(routing_ids)
        """What stands for an answer that is a picture; empty where the model has words alone."""
        serial = _serial(tokenizer)
        # two copies: the switch is a state of the tokenizer, and serving reads from several threads
        self._marked, self._plain = (Tokenizer.from_str(serial) for _ in range(2))
        self._plain.encode_special_tokens = True
        for copy in (self._marked, self._plain):
            copy.no_truncation()
            copy.no_padding()
        added = tokenizer.added_tokens_decoder
        self._special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
        self._layouts: dict[tuple[bool, tuple[int, ...]], list[_Slot | _Said]] = {}
        self._texts: dict[str, tuple[int, ...]] = {}
        self.end_id = self._end_id()
        """The token that ends an answer."""
        self.takes_system = self._takes_system()
        """Whether the template has a place for `Dialogue.system`."""

    def spans(self, dialogue: Dialogue, *, answer: bool = True) -> list[Span]:
        """The whole dialogue; with `answer=False` all that stands before the last answer, which is not read.

        The second is the beginning of the first, token by token. Raises DataError where pictures and places for them differ
        in number, for a system message that the template has no place for, and for an answer that the model cannot give.
        """
        if dialogue.system and not self.takes_system:
            raise DataError(
                f"dialogue '{dialogue.name}': the model's template has no place for a system message"
            )
        places = sum(turn.pictures for turn in dialogue.turns)
        if places != len(dialogue.pictures):
            pictures = f"{len(dialogue.pictures)} pictures for {places} places in its questions"
            raise DataError(f"dialogue '{dialogue.name}': has {pictures}")
        last, keys = len(dialogue.turns) - 1, iter(dialogue.pictures)
        spans: list[Span] = []
        for item in self._layout(bool(dialogue.system), tuple(turn.pictures for turn in dialogue.turns)):
            if isinstance(item, _Said):
                spans += self._said(item, dialogue)
            elif item.kind == "system":
                spans.append(Span(self._ids(dialogue.system)))
            elif item.kind == "text":
                spans.append(Span(self._ids(dialogue.turns[item.turn].question[item.part])))
            elif item.kind == "picture":
                spans.append(Span((self.picture_id,) * self.picture_tokens, picture=next(keys)))
            else:
                if self.template == "plain" and not _has_token_before(spans):
                    spans.append(Span((self._start_id(),)))
                if item.turn == last and not answer:
                    break
                spans += self._answer(dialogue, item.turn)
        return [span for span in spans if span.ids or span.picture is not None]

    def _answer(self, dialogue: Dialogue, turn: int) -> list[Span]:
        """Words, then the routing tokens of a picture: the first is the decision to learn, the others are put behind it."""
        ids = self._ids(dialogue.turns[turn].answer)
        spans = [Span(ids, learns=bool(ids), turn=turn)]
        if dialogue.turns[turn].picture:
            if not self.routing_ids:
                cure = "its answer is a picture, but the model says words alone; set model.output"
                raise DataError(f"dialogue '{dialogue.name}': {cure}")
            first, *rest = self.routing_ids
            spans += [Span((first,), learns=True, turn=turn), Span(tuple(rest))]
        return spans

    def fitted(self, dialogue: Dialogue, max_tokens: int, *, answer: bool = True) -> list[Span]:
        """As `spans`, within max_tokens: whole turns are left out, never a part of one and never a part of a picture.

        A dialogue to learn from loses its last turns. One to answer loses its oldest, but those with a picture stay. Raises
        DataError with its name, its tokens and the limit where that is not enough.
        """
        while True:
            spans = self.spans(dialogue, answer=answer)
            tokens = sum(len(span.ids) for span in spans)
            if tokens <= max_tokens:
                return spans
            shorter = _without_last(dialogue) if answer else _without_oldest(dialogue)
            if shorter is None:
                what = "its first turn takes" if answer else "its question and pictures take"
                cure = "raise model.max_tokens or shorten it"
                raise DataError(
                    f"dialogue '{dialogue.name}': {what} {tokens} tokens, the limit is {max_tokens}; {cure}"
                )
            dialogue = shorter

    def text(self, ids: Sequence[int]) -> str:
        """An answer's tokens as words, special tokens left out."""
        return self.words(ids).strip()

    def words(self, ids: Sequence[int]) -> str:
        """The same with the space around them."""
        words: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return words

    def _said(self, item: _Said, dialogue: Dialogue) -> list[Span]:
        """A template's piece, the end of an answer apart; an answer that is not known has no end to learn."""
        turn = dialogue.turns[item.turn]
        learns = item.learned > 0 and bool(turn.answer or turn.picture)
        end = Span(item.ids[: item.learned], learns=learns, turn=item.turn if learns else -1)
        return [end, Span(item.ids[item.learned :])]

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self._texts.get(text)
        if ids is None:
            ids = tuple(self._plain.encode(text, add_special_tokens=False).ids)
            if len(text) <= LONGEST_KEPT:
                if len(self._texts) >= 65536:  # questions repeat, captions do not
                    self._texts.clear()
                self._texts[text] = ids
        return ids

    def spare_id(self) -> int | None:
        """The highest special token that neither the tokenizer nor the template has a use for; None: there is none."""
        shapes = [(system, (0,)) for system in (False, True) if not system or self.takes_system]
        said = {
            i
            for shape in shapes
            for item in self._layout(*shape)
            if isinstance(item, _Said)
            for i in item.ids
        }
        return max(self._special - set(self.tokenizer.all_special_ids) - said, default=None)

    def _start_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def _end_id(self) -> int:
        said = self._layout(False, (0,))[-1]
        assert isinstance(said, _Said)
        return said.ids[said.learned - 1]

    def _takes_system(self) -> bool:
        if self.template == "plain":
            return False
        try:
            self._layout(True, (0,))
        except ConfigError:  # it refuses the role, as Gemma's does, or leaves the message out
            return False
        return True

    # ------------------------------------------------------------------------------------------------- the template's pieces

    def _layout(self, system: bool, pictures: tuple[int, ...]) -> list[_Slot | _Said]:
        """Slots and the template's words between them, for turns with these numbers of pictures."""
        items = self._layouts.get((system, pictures))
        if items is None:
            slots = [_Slot("system")] if system else []
            slots += [slot for turn, count in enumerate(pictures) for slot in _slots(turn, count)]
            items = self._chat(slots) if self.template == "chat" else self._in_a_row(slots)
            if len(slots) <= LONGEST_KEPT:  # a server's callers choose the shapes
                if len(self._layouts) >= 1024:
                    self._layouts.clear()
                self._layouts[system, pictures] = items
        return items

    def _in_a_row(self, slots: list[_Slot]) -> list[_Slot | _Said]:
        if self.tokenizer.eos_token_id is None:
            cure = "the tokenizer has no end-of-sequence token, so an answer never ends"
            raise ConfigError("model.template", "plain", cure)
        end = (int(self.tokenizer.eos_token_id),)
        items: list[_Slot | _Said] = []
        for slot in slots:
            items.append(slot)
            if slot.kind == "answer":
                items.append(_Said(end, learned=1, turn=slot.turn))
        return items

    def _chat(self, slots: list[_Slot]) -> list[_Slot | _Said]:
        words = SLOT.split(self._rendered(slots))
        if [int(number) for number in words[1::2]] != list(range(len(slots))):
            cure = "the tokenizer's chat template leaves out, repeats or moves what is said; use plain"
            raise ConfigError("model.template", "chat", cure)
        items: list[_Slot | _Said] = [_Said(self._template_ids(words[0]))]
        for slot, text in zip(slots, words[2::2], strict=True):
            ids = self._template_ids(text)
            items.append(slot)
            if slot.kind != "answer":
                items.append(_Said(ids))
                continue
            ends = [place for place, token in enumerate(ids) if token in self._special]
            if not ends:
                cure = "the tokenizer's chat template puts no special token behind an answer, so none ends; use plain"
                raise ConfigError("model.template", "chat", cure)
            items.append(_Said(ids, learned=ends[0] + 1, turn=slot.turn))
        return items

    def _rendered(self, slots: list[_Slot]) -> str:
        if not self.tokenizer.chat_template:
            raise ConfigError("model.template", "chat", "the tokenizer has no chat template; use plain")
        messages: list[dict[str, str]] = []
        for number, slot in enumerate(slots):
            role = {"answer": "assistant", "system": "system"}.get(slot.kind, "user")
            if not messages or messages[-1]["role"] != role:
                messages.append({"role": role, "content": ""})
            messages[-1]["content"] += f"{OPEN}{number}{CLOSE}"
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise ConfigError("model.template", "chat", f"the chat template fails: {error}") from None
        return text

    def _template_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._marked.encode(text, add_special_tokens=False).ids)


def _slots(turn: int, pictures: int) -> list[_Slot]:
    slots = [_Slot("text", turn)]
    for part in range(1, pictures + 1):
        slots += [_Slot("picture", turn, part), _Slot("text", turn, part)]
    return [*slots, _Slot("answer", turn)]


def _serial(tokenizer: PreTrainedTokenizerFast) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        cure = "is not one of the tokenizers library, so that special tokens cannot be kept out of what people write"
        raise ConfigError("model.language.tokenizer", type(tokenizer).__name__, cure)
    serial: str = backend.to_str()
    return serial


def _has_token_before(spans: list[Span]) -> bool:
    """Whether an answer's first token has one before it that has seen all pictures: it is predicted from there."""
    for span in reversed(spans):
        if span.ids:
            return True
        if span.picture is not None:
            return False
    return False


def _without_last(dialogue: Dialogue) -> Dialogue | None:
    turns = dialogue.turns[:-1]
    if not turns:
        return None
    pictures = dialogue.pictures[: sum(turn.pictures for turn in turns)]
    return replace(dialogue, turns=turns, pictures=pictures)


def _without_oldest(dialogue: Dialogue) -> Dialogue | None:
    for place, turn in enumerate(dialogue.turns[:-1]):
        if not turn.pictures:
            turns: tuple[Turn, ...] = dialogue.turns[:place] + dialogue.turns[place + 1 :]
            return replace(dialogue, turns=turns)
    return None
