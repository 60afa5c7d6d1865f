"""The report page: complete, self-contained, harmless whatever names and captions hold."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmray.errors import DataError
from fmray.pipeline.charts import Line, line_chart, number, span, ticks
from fmray.pipeline.report import render, write_report
from fmray.pipeline.scatter import Point
from fmray.pipeline.sections import (
    Answer,
    Bars,
    Code,
    Exhibit,
    Gallery,
    LineChart,
    Matrix,
    Report,
    Said,
    ScatterChart,
    Section,
    SideBySide,
    StackedChart,
    Table,
    Text,
    Tile,
)
from fmray.pipeline.stacked import stacked_chart

EVIL = "<script>alert('x')</script>\"' onload=alert(1) $title ${subtitle} &amp; 개"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags with their attributes, the text, and whether every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def picture(size: tuple[int, int] = (40, 20), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(stream, kind)
    return stream.getvalue()


def sections(words: str) -> tuple[Section, ...]:
    """One of each kind, with the words wherever words can stand."""
    answers = (Answer(words, 0.71, True), Answer(words, 0.2, False))
    pictures = (Answer(words, 0.7, False, picture()), Answer(words, 0.1, True, picture(kind="JPEG")))
    return (
        LineChart(words, (Line(words, ((0, 2.0), (10, 1.0))),), words, words, note=words),
        ScatterChart(words, (Point(words, 0.1, 0.2, 3.0, front=True),), words, words, words, words),
        StackedChart(words, (words, "b"), ((1, (2.0, 1.0)), (2, (1.0, 0.0))), words, words, words),
        SideBySide(words, (words, "b"), ((words, (Said(words, ((words, 0.5),)), Said(words))),), words),
        Gallery(words, (Exhibit(words, picture(), answers, words), Exhibit(words, None, pictures)), words),
        Matrix(words, (words, "b"), ((3, 1), (0, 0)), words),
        Table(words, (words, "ms"), ((words, 1.25), (words, 2)), words, wide=True),
        Bars(words, ((words, 3.0), ("b", 0.0)), words),
        Text(words, words),
        Code(words, words),
        Code(words, words, collapsed=False),
    )


def page(words: str) -> str:
    return render(Report(words, words, (Tile(words, words, words),), sections(words)))


def test_hostile_words_come_out_as_words() -> None:
    parsed = Page(page(EVIL))
    assert parsed.open == []
    assert {tag for tag, _ in parsed.tags} == {tag for tag, _ in Page(page("harmless")).tags}
    assert not parsed.named("script")
    assert not [key for _, attributes in parsed.tags for key in attributes if key.startswith("on")]
    assert parsed.words.count(EVIL) > 20
    assert EVIL in [image["alt"] for image in parsed.named("img")]


@settings(deadline=None)  # the first page takes longest, and a busy machine longer
@given(st.text(max_size=30))
def test_no_text_changes_the_pages_structure(words: str) -> None:
    shape = [tag for tag, _ in Page(page("plain")).tags if tag != "p"]  # an empty line makes two paragraphs
    assert [tag for tag, _ in Page(page(words or "plain")).tags if tag != "p"] == shape


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = page("plain")
    parsed = Page(html)
    assert all((image["src"] or "").startswith("data:image/webp;base64,") for image in parsed.named("img"))
    assert not parsed.named("link")
    assert not re.search(r"https?://|url\(|@import", html)
    assert all((anchor["href"] or "").startswith("#") for anchor in parsed.named("a"))
    [policy] = [meta["content"] for meta in parsed.named("meta") if "http-equiv" in meta]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_contents_lead_to_the_sections() -> None:
    parsed = Page(page("plain"))
    targets = [(anchor["href"] or "").removeprefix("#") for anchor in parsed.named("a")]
    assert targets == [section["id"] for section in parsed.named("section")]
    assert len(targets) == len(sections("plain"))


def test_a_text_opens_a_part_of_the_page() -> None:
    bars = Bars("b", (), "")
    parsed = Page(render(Report("r", "", (), (Text("first", ""), bars, Text("second", ""), bars, bars))))
    kinds = [attributes.get("class") for tag, attributes in parsed.tags if tag in ("div", "section")]
    assert kinds == ["part", "full", "half", "part", "full", "half", "half"]


def test_right_answers_are_marked_for_eyes_and_screen_readers() -> None:
    parsed = Page(page("plain"))
    assert [item["class"] for item in parsed.named("li") if item.get("class") in ("right", "other")] == [
        "right",
        "other",
        "other",
        "right",
    ]
    assert len([tag for tag in parsed.named("span") if tag.get("aria-label") == "right"]) == 2


def test_a_picture_that_is_none_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    broken = Gallery("broken", (Exhibit("x", b"<svg onload=alert(1)>", ()),))
    with pytest.raises(DataError, match="picture of the report"):
        write_report(Report("r", "", (), (broken,)), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_whole_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "demo" / "report.html"
    for words in ("first", "second"):
        assert write_report(Report(words, "", (), sections(words)), path) == path
    assert "second" in path.read_text(encoding="utf-8")
    assert "first" not in Page(path.read_text(encoding="utf-8")).words
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_an_empty_report_is_a_page() -> None:
    empty = (
        LineChart("a", (), "x", "y"),
        Gallery("b", ()),
        Matrix("c", (), ()),
        Table("d", (), ()),
        Bars("e", (), ""),
        StackedChart("f", ("a", "b"), (), "x", "y"),
        SideBySide("g", ("a",), ()),
    )
    assert Page(render(Report("nothing", "", (), empty))).open == []


# ------------------------------------------------------------------------------------------------------ charts


def coordinates(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline [^>]*points="([^"]*)"', svg)
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in lines]


def test_a_line_runs_from_corner_to_corner_and_down_means_less() -> None:
    [points] = coordinates(line_chart([Line("loss", ((0, 4.0), (5, 2.0), (10, 0.0)))], "step", "loss"))
    assert points == [(66.0, 30.0), (286.0, 128.0), (506.0, 226.0)]


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    nan, inf = math.nan, math.inf
    svg = line_chart([Line("loss", ((0, 1.0), (1, 2.0), (2, nan), (3, inf), (4, 1.5)))], "step", "loss")
    assert [len(run) for run in coordinates(svg)] == [2, 1]
    assert "nan" not in svg
    assert "inf" not in svg


@pytest.mark.parametrize("points", [(), ((3.0, 7.0),), ((0.0, 0.0), (1.0, 0.0)), ((0.0, 1e-9), (1.0, 1e9))])
def test_any_values_make_a_chart(points: tuple[tuple[float, float], ...]) -> None:
    svg = line_chart([Line("x", points)], "step", "y", from_zero=True)
    assert Page(svg).open == []
    assert all(0 <= x <= 520 and 0 <= y <= 270 for run in coordinates(svg) for x, y in run)


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    found = re.findall(r'<rect class="fill-\d" x="([^"]*)" width="([^"]*)" y="([^"]*)" height="([^"]*)"', svg)
    return [(float(x), float(width), float(y), float(height)) for x, width, y, height in found]


def test_stacked_parts_lie_on_each_other_and_fill_the_highest_bar() -> None:
    svg = stacked_chart(("act", "learn"), ((1, (1.0, 3.0)), (2, (1.0, 1.0))), "iteration", "s")
    (x, width, *first), (_, _, *second), (other, _, *third), _ = boxes(svg)
    assert first == [177.0, 49.0]  # a quarter of the height of the plot, from the axis up
    assert second == [30.0, 147.0]
    assert third == first
    assert other > x + width
    assert "act 1, learn 2" in svg


@pytest.mark.parametrize("bars", [(), ((5, (0.0, 0.0)),), ((1, (0.1, 0.2)), (900, (3.0, 0.0)))])
def test_any_bars_make_a_chart(bars: tuple[tuple[float, tuple[float, ...]], ...]) -> None:
    svg = stacked_chart(("a", "b"), bars, "x", "y")
    assert Page(svg).open == []
    assert all(x >= 66 and x + width <= 506.1 and 29.9 <= y <= 226 for x, width, y, _ in boxes(svg))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low: float, width: float) -> None:
    marks = ticks(low, low + width)
    assert 1 <= len(marks) <= 6
    if width > abs(low) * 1e-3:  # below that float64 blurs the differences
        assert len({f"{b - a:.6g}" for a, b in pairwise(marks)}) <= 1
    assert all(low - 1e-6 * width <= mark <= low + width * (1 + 1e-6) for mark in marks)


def test_numbers_are_short() -> None:
    values = [0.5, 0.28934, 1500, 0.0001, 2e-6, 330.0, 123456, 1.0, 0]
    assert [number(v) for v in values] == [
        "0.5",
        "0.2893",
        "1500",
        "0.0001",
        "2e-06",
        "330",
        "123456",
        "1",
        "0",
    ]
    assert span([2.0, 2.0]) == (2.0, 2.2)
    assert span([], from_zero=True) == (0.0, 1.0)
