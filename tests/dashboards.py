"""The shipped dashboard and alerts as tests read them: every query, and the metrics and labels in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "cluster/grafana/fmray-serving.json"
ALERTS = ROOT / "cluster/prometheus/alerts.yaml"
PROMETHEUS = ROOT / "cluster/prometheus/prometheus.yaml"

OURS = re.compile(r'\{__name__=~"\(ray_\)\?(fmray_[a-z_]+)"((?:,[^{}]*)?)\}')
RAYS = re.compile(r"\bray_(\w+)")
MATCHERS = re.compile(r'(\w+)(?:=~|!~|!=|=)"')
GROUPED = re.compile(r"\bby \(([^)]*)\)")


@dataclass(frozen=True, slots=True)
class Query:
    """`Query("Batches: Items of a batch A", 'sum(rate({__name__=~"(ray_)?fmray_…"}[1m]))')`"""

    place: str
    text: str

    @property
    def ours(self) -> list[tuple[str, list[str]]]:
        """Our metrics (histograms without their suffix) and the labels that are matched or grouped by."""
        grouped = [label.strip() for labels in GROUPED.findall(self.text) for label in labels.split(",")]
        return [
            (name.removesuffix("_bucket"), MATCHERS.findall(matchers) + grouped)
            for name, matchers in OURS.findall(self.text)
        ]

    @property
    def rays(self) -> list[str]:
        """Ray's own metrics, without the prefix."""
        return RAYS.findall(OURS.sub("", self.text))


def dashboard() -> dict[str, Any]:
    return dict(json.loads(DASHBOARD.read_text(encoding="utf-8")))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def panel_queries() -> list[Query]:
    return [
        Query(f"{panel['title']} {target['refId']}", target["expr"])
        for panel in panels()
        for target in panel["targets"]
    ]


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return list(group["rules"])


def alert_queries() -> list[Query]:
    return [Query(rule["alert"], rule["expr"]) for rule in alerts()]
