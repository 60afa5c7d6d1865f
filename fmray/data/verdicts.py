"""People's verdicts on texts, what a reward model learns from: labels, pairs, rankings, from reviews, JSON lines or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmray.config.reward import HubVerdicts, JsonlVerdicts, ReviewVerdicts, RewardDataConfig
from fmray.data.files import json_lines
from fmray.data.reviews import Review, load_reviews, text_hash
from fmray.data.sources import Split, data_folder, some, split_files
from fmray.errors import ConfigError, DataError

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (file and line, or split and number), and its keys."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One text and its label, or several texts from best to worst.

    `Verdict(("great fun .",), label=1)`, `Verdict(("2 + 2 = 4", "2 + 2 = 5"), margin=0.5)`
    """

    texts: tuple[str, ...]
    """Of pairs and rankings each is prompt and answer, put together by `joined`."""
    label: int = -1
    """Index into `Verdicts.labels`; -1 where texts are compared."""
    margin: float | None = None
    """By how much the better should lead, where the row says so."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """What to train on and what to measure on."""

    train: tuple[Verdict, ...]
    held_out: dict[str, tuple[Verdict, ...]]
    """By the part's name."""
    labels: tuple[str, ...]
    """In the order of the model's outputs; empty for pairs and rankings."""


CLOSING = ".,;:!?)]}%'’"


def joined(prompt: str, answer: str) -> str:
    """The text that is judged: prompt and answer, with a space between two words that neither side parts.

    `joined("2 + 2", "is 4")` is `"2 + 2 is 4"`; before what closes a sentence there is none.
    """
    apart = not prompt or not answer or prompt[-1].isspace() or answer[0].isspace()
    return prompt + answer if apart or answer[0] in CLOSING else f"{prompt} {answer}"


def open_verdicts(data: RewardDataConfig) -> Verdicts:
    """Everything, read and checked. Raises DataError with file and line, ConfigError, AssetError."""
    if isinstance(data.source, ReviewVerdicts):
        return review_verdicts(data.source, data.labels)
    train, held_out, known = (
        _jsonl_rows(data.source) if isinstance(data.source, JsonlVerdicts) else _hub_rows(data.source)
    )
    columns = data.source.columns
    if data.kind == "labelled":
        everything = [row for rows in (train, *held_out.values()) for row in rows]
        labels = data.labels or known or _labels_in(everything, columns)

        def read(row: Row) -> Verdict:
            return _labelled(row, columns, labels)
    else:
        labels, compare = (), _pair if data.kind == "pairs" else _ranking

        def read(row: Row) -> Verdict:
            return compare(row, columns)

    return Verdicts(
        tuple(map(read, train)), {name: tuple(map(read, rows)) for name, rows in held_out.items()}, labels
    )


# ------------------------------------------------------------------------------------------------------- movie reviews


def review_verdicts(source: ReviewVerdicts, names: tuple[str, ...] | None) -> Verdicts:
    """Rotten Tomatoes and, where asked for, continuations and pieces of IMDB; held out of each of the three a part.

    Every choice (how many words, which reviews) is a function of the review's text and its place alone.
    """
    if names is not None and len(names) != 2:
        raise ConfigError("data.labels", list(names), "reviews are negative or positive: give two names")
    tomatoes = {split: load_reviews(split, "rotten_tomatoes") for split in ("train", "test")}
    train = [_review(review, review.text) for review in tomatoes["train"]]
    if source.continuations:
        train += _continuations(tomatoes["train"], source.opening_words)
    train += _last_words(spread(load_reviews("train", "imdb"), source.imdb), source.imdb_words)
    held_out = {
        "rotten_tomatoes": [_review(review, review.text) for review in tomatoes["test"]],
        "continuations": _continuations(tomatoes["test"], source.opening_words),
        "imdb": _last_words(load_reviews("test", "imdb"), source.imdb_words),
    }
    parts = {name: tuple(rows) for name, rows in held_out.items()}
    return Verdicts(tuple(train), parts, names or ("negative", "positive"))


def spread(items: tuple[Any, ...], count: int | None) -> tuple[Any, ...]:
    """`count` of the items, evenly spread; all of them where there are fewer or count is None."""
    if count is None or count >= len(items):
        return items
    return tuple(items[index * len(items) // count] for index in range(count))


def _review(review: Review, text: str) -> Verdict:
    return Verdict((text,), label=int(review.label))


def _drawn(review: Review, words: tuple[int, int]) -> int:
    """A number of words in [min, max], drawn by the review's text."""
    low, high = words
    return low + text_hash(review.text) % (high - low + 1)


def _continuations(reviews: Iterable[Review], opening: tuple[int, int]) -> list[Verdict]:
    """Reviews without their first words, where more is left than was taken."""
    rows = []
    for review in reviews:
        words, count = review.text.split(), _drawn(review, opening)
        if len(words) >= 2 * count:
            rows.append(_review(review, " ".join(words[count:])))
    return rows


def _last_words(reviews: Iterable[Review], words: tuple[int, int]) -> list[Verdict]:
    return [_review(review, " ".join(review.text.split()[-_drawn(review, words) :])) for review in reviews]


# ------------------------------------------------------------------------------------------------------------- your own


def _jsonl_rows(source: JsonlVerdicts) -> tuple[list[Row], dict[str, list[Row]], tuple[str, ...]]:
    folder = data_folder(source.path)
    files: dict[Split, list[Path]] = {
        split: split_files(folder, split, ".jsonl") for split in ("train", "test")
    }

    def rows_of(path: Path) -> list[Row]:
        rows: list[Row] = [(f"{path}:{number}", row) for number, row in json_lines(path, "data.source.path")]
        if not rows:
            raise DataError(f"{path}: is empty")
        return rows

    train = [row for path in files["train"] for row in rows_of(path)]
    return train, {path.stem: rows_of(path) for path in files["test"]}, ()


def _hub_rows(source: HubVerdicts) -> tuple[list[Row], dict[str, list[Row]], tuple[str, ...]]:
    from fmray.data.hub import load_split

    def rows_of(split: str) -> tuple[list[Row], tuple[str, ...]]:
        loaded = load_split(source.path, source.config_name, split, key="data.source.path")
        feature = loaded.features.get(source.columns.get("label", "label"))
        named = tuple(getattr(feature, "names", None) or ())
        return [(f"{source.path}[{split}]#{number}", row) for number, row in enumerate(loaded)], named

    train, known = rows_of(source.train_split)
    held_out = {part_name(split): rows_of(split)[0] for split in source.test_splits}
    return train, held_out, known


def part_name(split: str) -> str:
    """A split's name as part of a metric's: `test[:10%]` becomes `test_10`."""
    return "_".join("".join(c if c.isalnum() else " " for c in split).split())


def _value(row: Row, name: str, columns: Mapping[str, str]) -> Any:
    where, keys = row
    key = columns.get(name, name)
    if key not in keys:
        raise DataError(
            f"{where}: has no key '{key}'; there are {some(sorted(keys))} (data.source.columns renames)"
        )
    return keys[key]


def _text(row: Row, name: str, columns: Mapping[str, str], *, blank: bool = False) -> str:
    value = _value(row, name, columns)
    if not isinstance(value, str) or not (blank or value.strip()):
        kind = "blank" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(f"{row[0]}: '{columns.get(name, name)}' must be a text, and is {kind}")
    return value


def _labels_in(rows: list[Row], columns: Mapping[str, str]) -> tuple[str, ...]:
    """The labels that occur, numbers by their size."""
    found: set[Any] = set()
    for row in rows:
        value = _value(row, "label", columns)
        if not isinstance(value, str | int):
            raise DataError(f"{row[0]}: a label must be a name or a whole number, not {value!r}")
        found.add(value)
    if len(found) < 2:
        raise DataError(
            f"{rows[0][0]} and all other rows have the label {found.pop()!r}: there is nothing to learn"
        )
    numbers = all(isinstance(value, int) for value in found)
    return tuple(map(str, sorted(found) if numbers else sorted(found, key=str)))


def _labelled(row: Row, columns: Mapping[str, str], labels: tuple[str, ...]) -> Verdict:
    """A label is told by its name, or by its number where that is no name."""
    text, value = _text(row, "text", columns), _value(row, "label", columns)
    if str(value) in labels:
        return Verdict((text,), label=labels.index(str(value)))
    if isinstance(value, int) and 0 <= value < len(labels):
        return Verdict((text,), label=int(value))
    raise DataError(f"{row[0]}: label {value!r} is none of {some(list(labels), 12)}")


def _prompt(row: Row, columns: Mapping[str, str]) -> str:
    """The prompt, which may be left out or empty."""
    return _text(row, "prompt", columns, blank=True) if columns.get("prompt", "prompt") in row[1] else ""


def _margin(row: Row, columns: Mapping[str, str]) -> float | None:
    value = row[1].get(columns.get("margin", "margin"))
    if value is not None and not isinstance(value, int | float):
        raise DataError(f"{row[0]}: 'margin' must be a number, not {value!r}")
    return None if value is None else float(value)


def _pair(row: Row, columns: Mapping[str, str]) -> Verdict:
    prompt = _prompt(row, columns)
    answers = [_text(row, name, columns, blank=bool(prompt)) for name in ("chosen", "rejected")]
    return Verdict(tuple(joined(prompt, answer) for answer in answers), margin=_margin(row, columns))


def _ranking(row: Row, columns: Mapping[str, str]) -> Verdict:
    prompt, answers = _prompt(row, columns), _value(row, "answers", columns)
    texts = isinstance(answers, list | tuple) and all(isinstance(answer, str) for answer in answers)
    if not texts or len(answers) < 2 or not (prompt or all(answer.strip() for answer in answers)):
        raise DataError(f"{row[0]}: 'answers' must be two or more texts, the best first")
    return Verdict(tuple(joined(prompt, answer) for answer in answers), margin=_margin(row, columns))


def reference_texts(path: str) -> list[str]:
    """The `text` of every line of a .jsonl file; raises DataError."""
    listing = Path(path).expanduser()
    rows = list(json_lines(listing, "normalize.texts"))
    bad = next((number for number, row in rows if not isinstance(row.get("text"), str)), None)
    if bad is not None or len(rows) < 2:
        where = f"{listing}:{bad}" if bad is not None else str(listing)
        raise DataError(f'{where}: normalize.texts needs two or more lines of {{"text": …}}')
    return [str(row["text"]) for _, row in rows]
