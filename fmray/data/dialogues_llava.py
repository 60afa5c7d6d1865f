"""Instructions about pictures in LLaVA's json: conversations of a human and a model, `<image>` where a picture stands."""

from __future__ import annotations

from typing import Any

from fmray.config.dialogues import LlavaSource
from fmray.data.dialogues import FolderPictures, ListedDialogues, entry_value, read_json, speaks_of_sides
from fmray.data.sources import Split, data_folder
from fmray.errors import DataError
from fmray.types import Dialogue, Turn

MARK = "<image>"
SPEAKERS = ("human", "gpt")


def open_llava(config: LlavaSource, split: Split) -> ListedDialogues:
    """The entries of a file, each a dialogue of one or more turns, called by `id` (or by their place, `#17`).

    Pictures are called as `image` names them. An entry may have none, one or several (a list); where it has one and no mark,
    the picture goes before the first text. Raises DataError that names file and entry.
    """
    key = f"data.source.{split}_file"
    path = config.train_file if split == "train" else config.test_file
    folder = data_folder(config.images, "data.source.images")
    entries = read_json(path, key)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{key}={path!r}: must be a list of one or more entries")
    dialogues = tuple(_dialogue(entry, place, path) for place, entry in enumerate(entries))
    return ListedDialogues(dialogues, FolderPictures(folder))


def _dialogue(entry: Any, place: int, path: str) -> Dialogue:
    name = f"#{place}"
    if isinstance(entry, dict) and isinstance(entry.get("id"), str | int):
        name = str(entry["id"])
    where = f"{path}: entry {name}"
    said = [
        (entry_value(part, "from", str, where), entry_value(part, "value", str, where))
        for part in entry_value(entry, "conversations", list, where)
    ]
    if not said or len(said) % 2 or any(who != SPEAKERS[i % 2] for i, (who, _) in enumerate(said)):
        speakers = ", ".join(who for who, _ in said) or "nobody"
        raise DataError(
            f"{where}: human and gpt must speak in turn, human first and gpt last; here {speakers}"
        )
    pictures = _pictures(entry, where)
    questions = [value for _, value in said[::2]]
    marks = sum(question.count(MARK) for question in questions)
    if marks == 0 and len(pictures) == 1:
        questions[0], marks = MARK + questions[0], 1
    if marks != len(pictures):
        raise DataError(f"{where}: its texts have {marks} {MARK} marks, and it has {len(pictures)} pictures")
    turns = tuple(
        Turn(_parts(question), answer) for question, (_, answer) in zip(questions, said[1::2], strict=True)
    )
    return Dialogue(name, pictures, turns, sided=speaks_of_sides(turns))


def _pictures(entry: Any, where: str) -> tuple[str, ...]:
    image = entry.get("image")
    named = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(named, list) or not all(isinstance(key, str) and key for key in named):
        raise DataError(f"{where}: 'image' must be a file's name or a list of them, not {image!r}"[:300])
    return tuple(named)


def _parts(question: str) -> tuple[str, ...]:
    """The texts around the marks, without the blanks and line breaks that part them from a mark or end them.

    `_parts("<image>\\nwhat is it?") == ("", "what is it?")`
    """
    return tuple(part.strip() for part in question.split(MARK))
