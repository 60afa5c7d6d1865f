"""A sweep's page: what stands in it, and that what comes from outside cannot get out of its place."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

from fmray.pipeline.scatter import Point, scatter_chart
from fmray.pipeline.sweep_report import write_sweep_report
from fmray.tuning.local import run_in_turn
from fmray.tuning.table import as_text, make_rows
from tests.descent import descents


def test_points_lie_where_their_numbers_say_and_the_front_is_joined() -> None:
    points = (
        Point("a<b>", 0.0, 0.0, color=1.0, front=True),
        Point("c", 1.0, -1.0, color=3.0, front=True),
        Point("worse", 0.0, -1.0, color=2.0),
        Point("beyond", 0.5, -0.5, good=False),
        Point("nowhere", math.nan, 1.0),
    )
    svg = ElementTree.fromstring(scatter_chart(points, "x", "y", "kl"))
    circles = svg.findall("circle")
    assert [circle.get("class") for circle in circles] == ["point unbeaten", "point unbeaten", "point"]
    assert [circle.get("style") for circle in circles] == [f"--share:{share:.3f}" for share in (0, 1, 0.5)]
    x, y = ([float(circle.get(axis, "nan")) for circle in circles] for axis in ("cx", "cy"))
    assert x[0] == x[2] < x[1]
    assert y[0] < y[1] == y[2]  # up is smaller in SVG
    assert len(svg.findall("path")) == 1
    front = svg.find("polyline")
    assert front is not None
    assert front.get("points") == f"{x[0]:.1f},{y[0]:.1f} {x[1]:.1f},{y[1]:.1f}"
    assert circles[0].find("title") is not None
    assert svg.get("aria-label") == "y over x: 4 points; not beaten: a<b>, c; colour: kl from 1 to 3"


def test_no_points_is_a_chart_too() -> None:
    assert "0 points" in scatter_chart((), "x", "y")


def test_the_page_shows_trials_trade_off_and_exploits(tmp_path: Path) -> None:
    axes = {
        "x": {"metric": "eval/closeness"},
        "y": {"metric": "eval/rate", "mode": "min"},
        "color": "train/x",
    }
    trials = descents(
        tmp_path,
        pareto=axes,
        constraints=[{"metric": "eval/rate", "max": 0.4}],
        scheduler={"kind": "pbt", "interval": 2, "quantile": 0.34},
        run={"name": "sweep", "storage": str(tmp_path)},
    )
    run_in_turn(trials, lambda: None)
    rows = make_rows(trials)
    page = Path(write_sweep_report(rows, trials)).read_text(encoding="utf-8")
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", page)
    assert titles[:2] == ["Trade-off", "Trials"]
    assert {"Exploits", "Resolved configuration", "eval/closeness"} <= set(titles)
    assert "<script" not in page
    for row in rows:
        assert row.name in page
    table = as_text(rows, trials).splitlines()
    assert table[0].split() == ["trial", "status", "step", "eval/closeness", "eval/rate", "train/x", "keys"]
    assert sum(line.startswith("*") for line in table) == 1


def test_names_from_outside_are_escaped(tmp_path: Path) -> None:
    space = {"optimizer.lr": {"kind": "grid", "values": (0.1,)}}
    trials = descents(tmp_path, space=space)
    run_in_turn(trials, lambda: None)
    trials.fail(0, "<img src=x onerror=alert(1)>")
    page = Path(write_sweep_report(make_rows(trials), trials)).read_text(encoding="utf-8")
    assert "<img" not in page
    assert "&lt;img src=x" in page
