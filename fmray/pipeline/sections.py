"""What a page can hold: charts, tables, galleries, texts, each a record that `report.render` draws."""

from __future__ import annotations

from dataclasses import dataclass

from fmray.pipeline.charts import Line
from fmray.pipeline.scatter import Point
from fmray.pipeline.stacked import Bar


@dataclass(frozen=True, slots=True)
class Tile:
    """One result of the first screen. `Tile("R@5, image to text", "0.53", "bar 0.50")`."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class LineChart:
    """Curves on one axis. `LineChart("Loss", (Line("loss", ((1, 5.5), (2, 5.1))),), "step", "nats")`."""

    title: str
    lines: tuple[Line, ...]
    x_label: str
    y_label: str
    from_zero: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class ScatterChart:
    """Points in a plane, a third number as their colour. `ScatterChart("Trade-off", points, "sentiment", "grammar", "kl")`."""

    title: str
    points: tuple[Point, ...]
    x_label: str
    y_label: str
    color_label: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class StackedChart:
    """A whole in parts, step by step. `StackedChart("Seconds", ("act", "learn"), ((1, (2.0, 3.1)),), "iteration", "s")`."""

    title: str
    parts: tuple[str, ...]
    bars: tuple[Bar, ...]
    x_label: str
    y_label: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A text and what judges gave it. `Said("was good fun.", (("sentiment", 2.1), ("grammar", -0.02)))`."""

    text: str
    scores: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SideBySide:
    """What was said to the same prompts at different times: (prompt, one answer for each column)."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Said, ...]], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers to a gallery's query, best first: a caption, or a picture with its name."""

    text: str
    score: float
    right: bool
    picture: bytes | None = None


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A query and its best answers. `Exhibit("dog face", png, (Answer("dog", 0.7, True), …), "rank 1")`."""

    title: str
    picture: bytes | None
    """Encoded as its source gave it; None where the query is a text."""
    answers: tuple[Answer, ...]
    badge: str = ""
    good: bool = True
    """The badge's tone."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Queries with their answers, the right ones marked."""

    title: str
    exhibits: tuple[Exhibit, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Counts, the true class in rows, the predicted one in columns."""

    title: str
    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; a column whose cells are all numbers is right-aligned. `wide` takes the page's width."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int, ...], ...]
    note: str = ""
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Amounts side by side. `Bars("Time by phase", (("train", 182.0), ("serve", 9.5)), "s")`."""

    title: str
    amounts: tuple[tuple[str, float], ...]
    unit: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs, separated by empty lines. It opens a part of the page: what follows stands below it, up to the next one."""

    title: str
    body: str


@dataclass(frozen=True, slots=True)
class Code:
    """Something to copy: a configuration, a command. Longer than a few lines, it opens on a click."""

    title: str
    code: str
    collapsed: bool = True


Section = LineChart | ScatterChart | StackedChart | SideBySide | Gallery | Matrix | Table | Bars | Text | Code


@dataclass(frozen=True, slots=True)
class Report:
    """Title, a line below it, the first screen's tiles, then sections in order."""

    title: str
    subtitle: str
    tiles: tuple[Tile, ...]
    sections: tuple[Section, ...]
