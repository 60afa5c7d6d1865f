"""Where questions about pictures come from: one protocol, seven kinds of data sets.

A source is random access to dialogues, which are texts that name their pictures by key; a picture is read when it is asked for.
Opening reads and checks all texts, so that a wrong one stops a run before it starts, and no picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from fmray.config.dialogues import (
    CaptionSource,
    DialogueSourceConfig,
    EasyVqaSource,
    HubVqaSource,
    LabelSource,
    LlavaSource,
    RequestSource,
    VqaV2Source,
)
from fmray.data.sources import Split, read_picture, some
from fmray.errors import DataError
from fmray.types import Dialogue, Turn


class DialogueSource(Protocol):
    """Random access to dialogues and their pictures; picklable."""

    def __len__(self) -> int:
        """Number of dialogues."""

    def __getitem__(self, index: int) -> Dialogue:
        """One dialogue, text only; raises DataError where it is damaged, IndexError past the end."""

    def picture(self, key: str) -> bytes:
        """The encoded picture of one of `Dialogue.pictures`, read now; raises DataError that names it."""


class PictureReader(Protocol):
    """Encoded pictures by key; picklable."""

    def read(self, key: str) -> bytes:
        """One picture; raises DataError that names it."""


@dataclass(frozen=True, slots=True)
class ListedDialogues:
    """Dialogues in memory, pictures where they are: `ListedDialogues((Dialogue(…),), FolderPictures(root))`."""

    dialogues: tuple[Dialogue, ...]
    pictures: PictureReader

    def __len__(self) -> int:
        return len(self.dialogues)

    def __getitem__(self, index: int) -> Dialogue:
        return self.dialogues[index]

    def picture(self, key: str) -> bytes:
        return self.pictures.read(key)


@dataclass(frozen=True, slots=True)
class FolderPictures:
    """Files under a folder: `FolderPictures(root, "test/").read("test/1.png")` reads `<root>/1.png`."""

    root: Path
    prefix: str = ""
    """Begins every key: it keeps pictures of two folders apart that are called the same."""

    def read(self, key: str) -> bytes:
        return read_picture(self.root / key.removeprefix(self.prefix), key)


def open_dialogues(config: DialogueSourceConfig, split: Split) -> DialogueSource:
    """The dialogues of one split, at least one; raises DataError in one line (AssetError for pinned data)."""
    # Imported here so that one kind does not pay for the libraries of the others.
    if isinstance(config, EasyVqaSource | VqaV2Source):
        from fmray.data.dialogues_vqa import open_easy_vqa, open_vqa_v2

        return open_vqa_v2(config, split) if isinstance(config, VqaV2Source) else open_easy_vqa(split)
    if isinstance(config, HubVqaSource):
        from fmray.data.dialogues_hub import open_hub_vqa

        return open_hub_vqa(config, split)
    if isinstance(config, LlavaSource):
        from fmray.data.dialogues_llava import open_llava

        return open_llava(config, split)
    if isinstance(config, RequestSource):
        from fmray.data.dialogues_requests import open_requests

        return open_requests(config, split)
    from fmray.data.dialogues_pairs import open_captions, open_labels

    assert isinstance(config, CaptionSource | LabelSource)
    return open_captions(config, split) if isinstance(config, CaptionSource) else open_labels(config, split)


# ------------------------------------------------------------------------------------------------------- shared pieces


def asked(
    name: str, picture: str, question: str, answer: str, *, answers: tuple[str, ...] = (), kind: str = ""
) -> Dialogue:
    """A dialogue of one turn: a picture, then the question."""
    turns = (Turn(("", question), answer),)
    return Dialogue(name, (picture,), turns, answers, kind, speaks_of_sides(turns, answers))


_SIDES = re.compile(
    r"\b(left|right)(most|wards?|hand(ed)?)?\b|\b(counter|anti)?clockwise\b"
    r"|(왼|오른)(쪽|편|손|팔|발|다리)|[좌우](측|회전)|시계\s*방향",
    re.IGNORECASE,
)


def speaks_of_sides(turns: Iterable[Turn], answers: Iterable[str] = ()) -> bool:
    """Whether a question or an answer speaks of left, right or a sense of rotation, in English or Korean.

    It errs to the safe side: "is that right?" counts, and costs no more than a mirror image.
    """
    texts = [text for turn in turns for text in (*turn.question, turn.answer)]
    return any(map(_has_sides, texts)) or any(map(_has_sides, answers))


@lru_cache(maxsize=1 << 16)  # answers repeat by the thousand
def _has_sides(text: str) -> bool:
    return _SIDES.search(text) is not None


def read_json(path: str, key: str) -> Any:
    """What a json file holds; raises DataError that names the key and the file."""
    file = Path(path).expanduser()
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{key}={path!r}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # ValueError: wrong JSON or wrong UTF-8
        raise DataError(f"{key}={path!r}: is not JSON ({error})") from None


def entry_value(entry: Any, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """A key's value of the right type; raises DataError that says what there is."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object with keys, not {type(entry).__name__}")
    if name not in entry:
        raise DataError(f"{where}: has no key '{name}'; there are {some(sorted(map(str, entry)), 12)}")
    value = entry[name]
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(
            {str: "a string", int: "a whole number", list: "a list", dict: "an object"}[kind]
            for kind in (kinds if isinstance(kinds, tuple) else (kinds,))
        )
        raise DataError(f"{where}: '{name}' must be {wanted}, not {type(value).__name__}")
    return value
