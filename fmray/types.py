"""The records that rooms hand to each other. B rows  T tokens  C,H,W pixels  D width of the shared space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

Metrics = dict[str, float]
"""Names as in `runtime/metrics.py`'s table, values as plain numbers."""


@dataclass(frozen=True, slots=True)
class ImageText:
    """One sample as a source gives it: an encoded picture and the captions that fit it.

    `ImageText(name="U+1F436.png", image=b"\\x89PNG…", captions=("dog face", "puppy"))`
    """

    name: str
    """What to call the sample in an error or a gallery."""
    image: bytes
    """The encoded file (PNG, JPEG, WebP, …)."""
    captions: tuple[str, ...]
    """At least one; the first is the sample's own name."""


@dataclass(frozen=True, slots=True)
class ImageTextBatch:
    """Pairs ready for a dual encoder, row i of each tensor belonging together."""

    pixels_BCHW: Tensor
    """uint8 [B, 3, H, W] on the way, float32 normalised once it is on the device (see `models.clip`)."""
    token_ids_BT: Tensor
    """int64 [B, T], right-padded."""
    mask_BT: Tensor
    """int64 [B, T], 1 at real tokens."""
    caption_key_B: Tensor
    """int64 [B], equal for equal captions: such rows are positives of each other."""

    def __len__(self) -> int:
        return self.pixels_BCHW.shape[0]

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return replace(
            self, **{name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__}
        )

    def rows(self, rows: slice) -> Self:
        """A micro-batch: the same rows of every tensor."""
        return replace(self, **{name: getattr(self, name)[rows] for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange. Where a picture stands is said by structure, never by a mark inside the text.

    `Turn(question=("", "what color is it?"), answer="red")`: a picture, then the question.
    """

    question: tuple[str, ...]
    """The texts before, between and behind the pictures: n + 1 texts hold n pictures."""
    answer: str
    """What the model should say; empty where it is yet to be said."""
    picture: str = ""
    """What the picture shows, in words, where the answer is a picture; `answer` is then what is said before it."""

    @property
    def pictures(self) -> int:
        """Pictures in the question."""
        return len(self.question) - 1


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Pictures and what is said about them; a question about a picture is a dialogue of one turn.

    `Dialogue("17", pictures=("12.png",), turns=(Turn(("", "what color is it?"), "red"),), answers=("red",), kind="color")`
    """

    name: str
    """What to call it in an error or a gallery."""
    pictures: tuple[str, ...]
    """Keys that the source reads pictures by, in the order of their places in the turns."""
    turns: tuple[Turn, ...]
    """At least one."""
    answers: tuple[str, ...] = ()
    """What people said to the last turn (VQA v2 has ten answers); empty: only the turn's own answer is known."""
    kind: str = ""
    """Type of question, for results by type; empty: one type."""
    sided: bool = False
    """It speaks of left and right: its pictures must not be mirrored."""
    system: str = ""
    """How to answer, said before the first turn, in place of what the chat template says there; empty: as the template says."""
    reply: str = ""
    """Key of a picture that answers the last turn; empty where the answer is words, or a picture that nobody has."""

    @property
    def question(self) -> str:
        """The last question as one text, pictures left out."""
        return " ".join(part.strip() for part in self.turns[-1].question if part.strip())


@dataclass(frozen=True, slots=True)
class Pictures:
    """The distinct pictures of some dialogues, as pixels or as what a locked tower made of them.

    `Pictures(("12.png",), pixels_NCHW=torch.zeros(1, 3, 64, 64, dtype=torch.uint8))`
    """

    keys: tuple[str, ...]
    """What dialogues name them by, one per row."""
    pixels_NCHW: Tensor | None = None
    """uint8 [N, 3, S, S]; None where features are given, or where there is no picture."""
    features_NPF: Tensor | None = None
    """float [N, P, F], the picture tower's tokens."""

    def rows(self, keys: Sequence[str]) -> list[int]:
        """The rows of some pictures."""
        place = {key: row for row, key in enumerate(self.keys)}
        return [place[key] for key in keys]

    def to(self, device: torch.device) -> Self:
        """The same pictures on a device."""
        moved = [None if t is None else t.to(device) for t in (self.pixels_NCHW, self.features_NPF)]
        return replace(self, pixels_NCHW=moved[0], features_NPF=moved[1])
