"""A real Prometheus scrapes a real endpoint and is asked every query of the shipped dashboard and alerts."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fmray.config.serving import ServeConfig
from fmray.runtime.ports import free_port
from fmray.serving.metrics import METRICS
from fmray.serving.opening import Endpoint
from tests.dashboards import ALERTS, PROMETHEUS, Query, alert_queries, dashboard, panel_queries
from tests.endpoint import data_url, picture, save_answering, save_tiny_checkpoint, serving
from tests.tiny_vqa import tiny_vqa

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="needs Prometheus (Debian's package of that name)"
    ),
]

RED = data_url(picture("red"))
WINDOW = "20s"
"""For Grafana's own, which is at least four scrapes."""
RAY_ALONE = ("Replicas", "Requests under way", "Failures of replicas", "GPUs")
"""Panels of which an endpoint without Ray shows nothing."""


def traffic(url: str) -> None:
    """A bit of everything that is counted, refusals too."""
    picture_part = {"type": "image_url", "image_url": {"url": RED}}
    turn = {"role": "user", "content": [picture_part, {"type": "text", "text": "what color ?"}]}
    with httpx.Client(base_url=url, timeout=60) as client:
        asked = [
            client.post("/v1/embeddings", json={"model": "clip", "input": ["red", RED]}),
            client.post("/v1/classify", json={"model": "clip", "input": [RED], "labels": ["red", "blue"]}),
            client.post("/v1/chat/completions", json={"model": "vqa", "messages": [turn], "max_tokens": 4}),
            client.post(
                "/v1/embeddings", json={"model": "clip", "input": [{"image": "https://a.example/b"}]}
            ),
            client.get("/ready"),
            client.post(
                "/v1/embeddings",
                json={"model": "clip", "input": ["red"] * 2000},
                headers={"x-request-timeout-seconds": "0.1"},
            ),
        ]
    assert [each.status_code for each in asked[:5]] == [200, 200, 200, 400, 200]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    clip = save_tiny_checkpoint(tmp_path_factory.mktemp("clip"))
    vqa = save_answering(tiny_vqa(seed=2), tmp_path_factory.mktemp("vqa"))
    batch = {"max_items": 2, "wait_ms": 2.0}
    with serving(
        Endpoint(ServeConfig(checkpoint=clip, model_id="clip", more={"vqa": vqa}, batch=batch)).app
    ) as url:
        yield url


@contextmanager
def prometheus_of(job: str, target: str, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus with the shipped configuration, of which one job remains, with this target, scraped each second."""
    port = free_port()
    config = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    [kept] = [each for each in config["scrape_configs"] if each["job_name"] == job]
    kept.pop("http_sd_configs", None)
    config["scrape_configs"] = [{**kept, "static_configs": [{"targets": [target]}]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yaml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                _wait_until_ready(client, process, folder / "log")
                yield client
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def prometheus(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus_of("fmray", url.removeprefix("http://"), folder) as client:
        _send_until_seen(client, url)
        yield client


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"Prometheus does not come up: {log.read_text()}")


def _send_until_seen(client: httpx.Client, url: str) -> None:
    """A series has a rate once it was scraped twice with something in between."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        traffic(url)
        time.sleep(1)
        rate = "sum by (reason) (rate(fmray_rejected_total[20s])) > 0"
        if ask(client, rate) and ask(client, "sum(rate(fmray_cache_hits_total[20s])) > 0"):
            return
    raise TimeoutError("Prometheus has not seen the endpoint's traffic")


def ask(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    reply = client.get("/api/v1/query", params={"query": query}).json()
    assert reply["status"] == "success", reply
    assert not reply.get("warnings"), reply
    return list(reply["data"]["result"])


@pytest.mark.parametrize("query", panel_queries(), ids=lambda query: query.place)
def test_every_panel_shows_something(prometheus: httpx.Client, query: Query) -> None:
    text = (
        query.text.replace("$__rate_interval", WINDOW).replace("$application", ".*").replace("$model", ".*")
    )
    found = ask(prometheus, text)
    if query.place.rpartition(" ")[0] in RAY_ALONE:
        assert found == []
        return
    assert found, text
    assert all(float(series["value"][1]) >= 0 for series in found), found  # NaN is not


def test_figures_are_those_of_the_traffic(prometheus: httpx.Client) -> None:
    shares = {
        query.place: ask(
            prometheus, query.text.replace("$__rate_interval", WINDOW).replace("$application", ".*")
        )
        for query in panel_queries()
        if query.place.startswith("Share of answers")
    }
    values = [float(series["value"][1]) for found in shares.values() for series in found]
    assert len(values) == 3
    assert values[0] == pytest.approx(1 / 5, abs=0.15), "one in five without the probe came too late"
    assert values[1] == 0
    assert values[2] == pytest.approx(1 / 5, abs=0.15), "one in five was refused"


@pytest.mark.parametrize("query", alert_queries(), ids=lambda query: query.place)
def test_every_alert_is_evaluated(prometheus: httpx.Client, query: Query) -> None:
    ask(prometheus, query.text)
    [group] = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    [rule] = [rule for rule in group["rules"] if rule["name"] == query.place]
    assert (rule["health"], rule.get("lastError", "")) == ("ok", "")
    assert rule["lastEvaluation"] > "2020"


def test_variables_of_the_dashboard_find_their_values(prometheus: httpx.Client) -> None:
    [variable] = [each for each in dashboard()["templating"]["list"] if each["name"] == "model"]
    selector = variable["definition"].removeprefix("label_values(").rpartition(",")[0]
    reply = prometheus.get("/api/v1/label/model/values", params={"match[]": selector}).json()
    assert reply["data"] == ["clip", "vqa"]


@pytest.mark.ray
def test_the_same_queries_find_what_rays_exporter_tells(ray_session: None, tmp_path: Path) -> None:
    import ray

    from fmray.runtime.ray_serve import metrics_sink

    node, sink = ray.nodes()[0], metrics_sink(METRICS)
    values = {"code": "500", "reason": "overloaded", "direction": "said", "outcome": "ok"}
    rows = {
        name: {label: values.get(label, "m") for label in metric.labels} for name, metric in METRICS.items()
    }
    rows["fmray_requests_total"] = {"route": "/v1/embeddings", "code": "500"}
    rows["fmray_request_seconds"] = {"route": "/v1/embeddings"}
    # none of them is Ray's own: those are tested by their names
    missing = [query for query in panel_queries() if not query.rays]
    window = "60s"  # Ray's processes report every ten seconds
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    with prometheus_of("ray", target, tmp_path) as client:
        deadline = time.monotonic() + 120
        while missing and time.monotonic() < deadline:
            for name, labels in rows.items():
                sink(name, 0.3, labels)
            time.sleep(2)
            texts = [query.text.replace("$__rate_interval", window) for query in missing]
            found = [
                ask(client, text.replace("$application", ".*").replace("$model", ".*")) for text in texts
            ]
            missing = [query for query, series in zip(missing, found, strict=True) if not series]
        assert missing == []
        for query in alert_queries():
            ask(client, query.text)
