"""The table of metrics: what counts into it, that an endpoint moves each row, that dashboard and alerts know what there is."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from fmray.config.serving import ServeConfig
from fmray.serving.metrics import METRICS, Meters
from fmray.serving.opening import Endpoint
from tests.dashboards import (
    ALERTS,
    PROMETHEUS,
    ROOT,
    Query,
    alert_queries,
    alerts,
    dashboard,
    panel_queries,
    panels,
)
from tests.endpoint import data_url, picture
from tests.unit.serving.test_chat import LOOP, post, send

SERVES = ("application", "deployment", "replica", "instance", "le")
"""Labels that Ray Serve, Prometheus and histograms add to ours."""
ALL_QUERIES = [*panel_queries(), *alert_queries()]
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)"
)

# ---------------------------------------------------------------------------------------------- the table


def test_names_are_prometheus_own_way() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"fmray_[a-z_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert bool(metric.buckets) == (metric.kind == "histogram"), name
        assert list(metric.buckets) == sorted({bound for bound in metric.buckets if bound > 0}), name
        assert not set(metric.labels) & set(SERVES), name


def test_what_is_counted_is_told_in_both_places() -> None:
    told: list[Any] = []
    meters = Meters(lambda *each: told.append(each))
    meters.count("fmray_items_total", 3, model="m")
    meters.count("fmray_items_total", model="m")
    meters.gauge("fmray_held_items", 7, model="m")
    meters.observe("fmray_batch_items", 5, model="m")
    shown = _samples(meters.text().decode())
    assert shown["fmray_items_total", "m"] == 4
    assert shown["fmray_held_items", "m"] == 7
    assert (shown["fmray_batch_items_count", "m"], shown["fmray_batch_items_sum", "m"]) == (1, 5)
    assert told == [
        ("fmray_items_total", 3, {"model": "m"}),
        ("fmray_items_total", 1, {"model": "m"}),
        ("fmray_held_items", 7, {"model": "m"}),
        ("fmray_batch_items", 5, {"model": "m"}),
    ]


def test_a_name_or_a_label_that_the_table_lacks_is_refused() -> None:
    meters = Meters()
    with pytest.raises(KeyError):
        meters.count("fmray_batch_pixels", model="m")
    with pytest.raises(KeyError):
        meters.gauge("fmray_items_total", 1, model="m")
    with pytest.raises(ValueError, match="label"):
        meters.count("fmray_items_total", route="/v1/embeddings")


# ---------------------------------------------------------------------------------------- an endpoint moves it

RED = data_url(picture("red"))


def _samples(text: str) -> dict[tuple[str, str], float]:
    """Sums over all labels but the model: (sample's name, model) → value, without buckets."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                key = (sample.name, sample.labels.get("model", "-"))
                found[key] = found.get(key, 0) + sample.value
    return found


def _embed(app: FastAPI, *inputs: str | dict[str, str], **headers: str) -> int:
    body = {"model": "clip", "input": list(inputs)}
    return send(app, "POST", "/v1/embeddings", json=body, headers=headers).status_code


def _classify(app: FastAPI) -> int:
    return post(app, {"model": "clip", "input": [RED], "labels": ["red", "blue"]}, "/v1/classify").status_code


def _chat(app: FastAPI) -> int:
    turn = {"role": "user", "content": [{"type": "text", "text": "what color is the circle ?"}]}
    turn["content"].insert(0, {"type": "image_url", "image_url": {"url": RED}})  # type: ignore[attr-defined]
    return post(app, {"model": "vqa", "messages": [turn]}).status_code


@pytest.fixture(scope="module")
def endpoint(checkpoint: str, vqa_checkpoint: str) -> FastAPI:
    config = ServeConfig(checkpoint=checkpoint, model_id="clip", more={"vqa": vqa_checkpoint})
    return Endpoint(config).app


MOVES: dict[str, tuple[Callable[[FastAPI], Any], str, tuple[str, ...]]] = {
    "embeddings": (
        lambda app: _embed(app, "red", RED),
        "clip",
        (
            "fmray_prepare_seconds_count",
            "fmray_queue_seconds_count",
            "fmray_infer_seconds_count",
            "fmray_batch_items_sum",
            "fmray_items_total",
        ),
    ),
    "chat": (
        _chat,
        "vqa",
        (
            "fmray_prepare_seconds_count",
            "fmray_queue_seconds_count",
            "fmray_infer_seconds_count",
            "fmray_first_token_seconds_count",
            "fmray_batch_items_sum",
            "fmray_items_total",
            "fmray_tokens_total",
        ),
    ),
    "classify": (_classify, "clip", ("fmray_cache_misses_total",)),
    "classify again": (_classify, "clip", ("fmray_cache_hits_total",)),
    "an address": (
        lambda app: _embed(app, {"image": "https://example.org/a.png"}),
        "-",
        ("fmray_fetches_total",),
    ),
    "a health check": (
        lambda app: send(app, "GET", "/health").status_code,
        "-",
        ("fmray_requests_total", "fmray_request_seconds_count"),
    ),
}


def test_every_row_moves_when_it_should(endpoint: FastAPI) -> None:
    moved = set()
    for name, (ask, model, rows) in MOVES.items():
        before = _samples(send(endpoint, "GET", "/metrics").text)
        status = ask(endpoint)
        after = _samples(send(endpoint, "GET", "/metrics").text)
        assert status == (400 if name == "an address" else 200), name
        for row in rows:
            assert after[row, model] > before.get((row, model), 0), (name, row)
            moved.add(re.sub("_(count|sum)$", "", row))
    assert send(endpoint, "GET", "/ready").status_code == 200
    shown = _samples(send(endpoint, "GET", "/metrics").text)
    assert (shown["fmray_ready", "clip"], shown["fmray_ready", "vqa"]) == (1, 1)
    assert (shown["fmray_held_items", "clip"], shown["fmray_held_bytes", "vqa"]) == (0, 0)
    rest = {"fmray_ready", "fmray_held_items", "fmray_held_bytes", "fmray_rejected_total"}
    assert moved | rest == set(METRICS)


def test_one_forward_is_one_observation_and_every_item_one_of_its_wait(endpoint: FastAPI) -> None:
    before = _samples(send(endpoint, "GET", "/metrics").text)
    assert _embed(endpoint, "red", "blue", "green") == 200
    after = _samples(send(endpoint, "GET", "/metrics").text)

    def more(row: str) -> float:
        return after[row, "clip"] - before.get((row, "clip"), 0)

    forwards = more("fmray_infer_seconds_count")
    assert forwards == more("fmray_batch_items_count") >= 1
    assert more("fmray_batch_items_sum") == more("fmray_queue_seconds_count") == 3
    assert more("fmray_prepare_seconds_count") == more("fmray_items_total") == 3


def test_a_full_queue_and_a_deadline_are_counted_by_reason(checkpoint: str) -> None:
    config = ServeConfig(checkpoint=checkpoint, model_id="clip", batch={"wait_ms": 1000.0, "queue_items": 1})
    app = Endpoint(config).app
    assert _embed(app, "red", **{"x-request-timeout-seconds": "0.2"}) == 504
    text = send(app, "GET", "/metrics").text
    assert 'fmray_rejected_total{model="clip",reason="deadline"} 1.0' in text
    assert 'fmray_requests_total{code="504",route="/v1/embeddings"} 1.0' in text

    async def together() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": "clip", "input": "red"}
            replies = await asyncio.gather(*[client.post("/v1/embeddings", json=body) for _ in range(3)])
        return sorted(reply.status_code for reply in replies)

    assert asyncio.run_coroutine_threadsafe(together(), LOOP).result(60) == [200, 429, 429]
    assert 'reason="overloaded"} 2.0' in send(app, "GET", "/metrics").text


# ------------------------------------------------------------------------------------ dashboard and alerts


@pytest.mark.parametrize("query", ALL_QUERIES, ids=lambda query: query.place)
def test_queries_ask_for_what_there_is(query: Query) -> None:
    assert query.ours or query.rays or "up{" in query.text
    assert "fmray_" not in re.sub(r'__name__=~"\(ray_\)\?fmray_', "", query.text), (
        "both names are to be found"
    )
    for name, labels in query.ours:
        assert name in METRICS, name
        metric = METRICS[name]
        for label in labels:
            assert label in (*metric.labels, *SERVES), f"{name} has no label {label}"
        suffixed = f"{name}_bucket" in query.text
        assert suffixed == (metric.kind == "histogram"), f"{name}: a histogram is asked for its buckets"
        if metric.kind != "gauge":
            assert re.search(r"(rate|increase)\(", query.text), f"{name} only ever grows"


def test_every_row_of_the_table_is_on_the_dashboard() -> None:
    shown = {name for query in panel_queries() for name, _ in query.ours}
    assert shown == set(METRICS)


def test_rays_own_metrics_are_rays() -> None:
    spec = find_spec("ray")
    if spec is None or spec.origin is None:
        pytest.skip("needs ray")
    folder = Path(spec.origin).parent
    places = [
        *(folder / "serve/_private").glob("*.py"),
        folder / "dashboard/modules/reporter/reporter_agent.py",
    ]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in places)
    names = {name for query in ALL_QUERIES for name in query.rays}
    assert len(names) >= 5
    for name in names:
        assert f'"{name}"' in sources or f'"{name.removesuffix("_total")}"' in sources, name


def test_the_dashboard_takes_any_prometheus() -> None:
    board = dashboard()
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$([a-z]+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables.keys(), target["expr"]
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert shown <= grouped, target["legendFormat"]
    places = [panel["gridPos"] for panel in board["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)), "no panel lies over another"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_every_alert_has_its_line_in_the_runbook() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", runbook, re.MULTILINE)
    }
    for rule in alerts():
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (path, anchor in anchors) == ("docs/runbook.md", True)
        assert f"`{rule['alert']}`" in runbook


# ----------------------------------------------------------------------------------------------- promtool


def promtool(*arguments: str | Path) -> None:
    run = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_promtool
def test_promtool_takes_the_files() -> None:
    promtool("check", "config", PROMETHEUS)
    promtool("check", "rules", ALERTS)


REQUESTS = 'fmray_requests_total{route="/v1/embeddings",code="%s",application="clip"}'
SECONDS = 'fmray_request_seconds_bucket{route="/v1/embeddings",le="%s"}'
FIRST = 'fmray_first_token_seconds_bucket{model="m",le="%s"}'
REJECTED = 'ray_fmray_rejected_total{model="m",application="a",reason="%s"}'
ITEMS = 'ray_fmray_items_total{model="m",application="a"}'
HEALTHY, AIMED = (
    f'ray_serve_{name}{{application="a",deployment="Model"}}'
    for name in ("deployment_replica_healthy", "autoscaling_target_replicas")
)
ON_FIRE: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    # series in which it fires, series in which it does not; one value a minute
    "FmrayDown": ({'up{job="fmray"}': "0x30"}, {'up{job="fmray"}': "1x30"}),
    "FmrayNotReady": (
        {'ray_fmray_ready{model="m",replica="1"}': "0x30", 'ray_fmray_ready{model="m",replica="2"}': "1x30"},
        {'fmray_ready{model="m"}': "1x30"},
    ),
    "FmrayErrors": (
        {REQUESTS % 200: "0+97x30", REQUESTS % 503: "0+3x30"},
        {REQUESTS % 200: "0+99x30", REQUESTS % 500: "0+1x30", REQUESTS % 429: "0+50x30"},
    ),
    "FmraySlow": (
        {SECONDS % 2.5: "0+90x30", SECONDS % 5: "0+100x30", SECONDS % "+Inf": "0+100x30"},
        {SECONDS % 2.5: "0+100x30", SECONDS % 5: "0+100x30", SECONDS % "+Inf": "0+100x30"},
    ),
    "FmrayFirstTokenSlow": (
        {FIRST % 5: "0+90x30", FIRST % 10: "0+100x30", FIRST % "+Inf": "0+100x30"},
        {FIRST % 5: "0+100x30", FIRST % 10: "0+100x30", FIRST % "+Inf": "0+100x30"},
    ),
    "FmrayRejected": (
        {REJECTED % "deadline": "0+6x30", ITEMS: "0+94x30"},
        {REJECTED % "deadline": "0+4x30", ITEMS: "0+96x30"},
    ),
    "FmrayQueueFull": (
        {REJECTED % "overloaded": "0+6x30", ITEMS: "0+1000x30"},
        {REJECTED % "deadline": "0+6x30", ITEMS: "0+1000x30"},
    ),
    "FmrayOutOfMemory": (
        {REJECTED % "out_of_memory": "0+1x30", ITEMS: "0+1000x30"},
        {REJECTED % "out_of_memory": "7x30", ITEMS: "0+1000x30"},
    ),
    "FmrayReplicasMissing": ({HEALTHY: "1x30", AIMED: "2x30"}, {HEALTHY: "2x30", AIMED: "2x30"}),
}


def test_every_alert_is_tried() -> None:
    assert set(ON_FIRE) == {rule["alert"] for rule in alerts()}


@needs_promtool
@pytest.mark.parametrize("name", ON_FIRE)
def test_an_alert_fires_when_it_should_and_not_else(name: str, tmp_path: Path) -> None:
    def case(series: dict[str, str], *, fires: bool) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": each, "values": values} for each, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)',
                    "eval_time": "25m",
                    "exp_samples": [{"labels": "{}", "value": 1 if fires else 0}],
                }
            ],
        }

    burning, calm = ON_FIRE[name]
    tests = [case(burning, fires=True), case(calm, fires=False)]
    file = tmp_path / "alerts_test.yaml"
    rules = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests}
    file.write_text(yaml.safe_dump(rules))
    promtool("test", "rules", file)
