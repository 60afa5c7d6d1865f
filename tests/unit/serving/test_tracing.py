"""Traces: a real endpoint, OpenTelemetry's real exporter, and a collector that decodes what arrives."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

import fmray
import fmray.errors
from fmray.config.serving import ServeConfig, TraceConfig
from fmray.errors import MissingExtra
from fmray.runtime.ports import free_port
from fmray.serving.finished import MOST_STAGES, Finished, Stage, begin_stages, note_stage
from fmray.serving.keys import KeyFile
from fmray.serving.opening import Endpoint
from fmray.serving.tracing import open_tracer
from tests.endpoint import data_url, picture, serving

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PROMPT, MODEL = "a sentence that nobody may read", "tiny"
SERVER, ERROR = 2, 2
"""SpanKind and StatusCode of OTLP."""


class Collector:
    """What has been received."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    @property
    def resources(self) -> list[Any]:
        parsed = [trace_service.ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [resource for each in parsed for resource in each.resource_spans]

    @property
    def spans(self) -> list[Any]:
        return [span for resource in self.resources for scope in resource.scope_spans for span in scope.spans]

    def roots(self) -> dict[str, Any]:
        """By request id."""
        return {attributes(span)["fmray.request_id"]: span for span in self.spans if span.kind == SERVER}

    def below(self, root: Any) -> dict[str, Any]:
        """By name; each name stands once in what these tests send."""
        return {span.name: span for span in self.spans if span.parent_span_id == root.span_id}


def attributes(span: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def seconds(span: Any) -> float:
    return float(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A real OTLP/HTTP receiver."""
    seen = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.headers.append({name.lower(): value for name, value in self.headers.items()})
            seen.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield seen
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def traced(checkpoint: str, trace: dict[str, Any], **config: Any) -> Iterator[httpx.Client]:
    """An endpoint; once it has ended, its spans have arrived."""
    app = Endpoint(ServeConfig(checkpoint=checkpoint, model_id=MODEL, trace=trace, **config)).app
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def embed(client: httpx.Client, request_id: str, *texts: str, **headers: str) -> httpx.Response:
    body = {"model": MODEL, "input": list(texts) or [PROMPT]}
    return client.post("/v1/embeddings", json=body, headers={"x-request-id": request_id, **headers})


# ----------------------------------------------------------------------------------------------- one request


def test_a_request_is_a_span_and_its_time_is_below_it(checkpoint: str, collector: Collector) -> None:
    began = time.time()
    with traced(checkpoint, {"endpoint": collector.url}) as client:
        reply = embed(client, "mine-7", PROMPT, data_url(picture("red")))
        assert reply.status_code == 200
    ended = time.time()
    [root] = collector.roots().values()
    assert (root.name, root.kind, root.status.code) == ("POST /v1/embeddings", SERVER, 0)
    assert not root.parent_span_id
    told = attributes(root)
    assert told.pop("fmray.model") == MODEL
    assert told == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "fmray.request_id": "mine-7",
    }
    assert began <= root.start_time_unix_nano / 1e9 <= root.end_time_unix_nano / 1e9 <= ended
    below = [span for span in collector.spans if span.parent_span_id == root.span_id]
    assert {span.name for span in below} == {"prepare", "queue", "infer", "answer"}
    assert {attributes(span).get("fmray.model") for span in below if span.name != "answer"} == {MODEL}
    assert len(below) == len(collector.spans) - 1
    for span in below:
        assert span.trace_id == root.trace_id
        assert root.start_time_unix_nano <= span.start_time_unix_nano, span.name
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano, span.name
    longest = {name: max(seconds(span) for span in below if span.name == name) for name in ("queue", "infer")}
    assert longest["queue"] * 1000 == pytest.approx(float(reply.headers["x-queue-ms"]), abs=0.1)
    assert longest["infer"] * 1000 == pytest.approx(float(reply.headers["x-inference-ms"]), abs=0.1)


def test_who_is_served_and_by_whom(
    checkpoint: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20collector")
    with traced(checkpoint, {"endpoint": collector.url}) as client:
        assert embed(client, "one").status_code == 200
    told = attributes(collector.resources[0].resource)
    assert (told["service.name"], told["service.version"]) == ("pictures", fmray.__version__)
    assert told["deployment.environment"] == "test"
    assert collector.headers[0]["authorization"] == "Bearer collector"
    assert collector.headers[0]["content-type"] == "application/x-protobuf"


def test_nothing_that_a_stranger_sends_is_in_a_span_but_his_id(
    checkpoint: str, collector: Collector, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    key = KeyFile(file).add("alice")
    with traced(checkpoint, {"endpoint": collector.url}, access={"key_file": str(file)}) as client:
        headers = {"authorization": f"Bearer {key}", "user-agent": "an agent", "tracestate": "vendor=told"}
        image = data_url(picture("red"))
        assert embed(client, "one", PROMPT, image, **headers).status_code == 200
        assert embed(client, "two", PROMPT, authorization="Bearer fmray-guessed").status_code == 401
        client.get("/v1/models/a-name-of-mine?token=abc", headers={**headers, "x-request-id": "three"})
        client.get("/a/path/of/mine", headers={**headers, "x-request-id": "four"})
    roots = collector.roots()
    assert attributes(roots["one"])["fmray.key_name"] == "alice"
    assert "fmray.key_name" not in attributes(roots["two"])
    assert attributes(roots["three"])["http.route"] == "/v1/models/{model_id:path}"
    assert (roots["four"].name, attributes(roots["four"])["http.route"]) == ("GET -", "-")
    everything = b"".join(collector.bodies)
    for secret in (PROMPT, key, "guessed", image[30:60], "an agent", "vendor", "of-mine", "abc", "of/mine"):
        assert secret.encode() not in everything, secret


def test_statuses(checkpoint: str, collector: Collector) -> None:
    with traced(checkpoint, {"endpoint": collector.url}, batch={"wait_ms": 1000.0}) as client:
        assert embed(client, "late", **{"x-request-timeout-seconds": "0.2"}).status_code == 504
        assert client.get("/health", headers={"x-request-id": "fine"}).status_code == 200
        assert client.post("/v1/embeddings", json={}, headers={"x-request-id": "wrong"}).status_code == 400
    roots = collector.roots()
    assert (roots["late"].status.code, attributes(roots["late"])["error.type"]) == (ERROR, "504")
    assert 0.2 <= seconds(roots["late"]) < 1.0
    assert roots["wrong"].status.code == 0, "a client's mistake is no error of the server's"
    assert "error.type" not in attributes(roots["wrong"])
    assert attributes(roots["wrong"])["http.response.status_code"] == 400
    assert list(collector.below(roots["fine"])) == ["answer"]


def test_a_streams_answer_lasts_until_its_end(vqa_checkpoint: str, collector: Collector) -> None:
    turn = {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": data_url(picture("red"))}},
            {"type": "text", "text": "what color is the circle ?"},
        ],
    }
    body = {"model": MODEL, "messages": [turn], "stream": True, "max_tokens": 8}
    with traced(vqa_checkpoint, {"endpoint": collector.url}) as client:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            headers_at = time.time()
            reply.read()
        assert reply.status_code == 200
    [root] = collector.roots().values()
    below = collector.below(root)
    assert set(below) == {"prepare", "queue", "infer", "answer"}
    assert attributes(root)["fmray.model"] == MODEL
    assert below["prepare"].end_time_unix_nano == pytest.approx(below["queue"].start_time_unix_nano, abs=1000)
    assert below["queue"].end_time_unix_nano == pytest.approx(below["infer"].start_time_unix_nano, abs=1000)
    answer = below["answer"]
    assert below["infer"].start_time_unix_nano < answer.start_time_unix_nano
    assert answer.start_time_unix_nano / 1e9 <= headers_at
    assert answer.end_time_unix_nano == pytest.approx(root.end_time_unix_nano, abs=5_000_000)
    assert answer.start_time_unix_nano > root.start_time_unix_nano, "before it came the first token"


# -------------------------------------------------------------------------------------------- whose trace


def test_traceparent_is_honoured(checkpoint: str, collector: Collector) -> None:
    with traced(checkpoint, {"endpoint": collector.url, "share": 0.0}) as client:
        embed(client, "asked", traceparent=PARENT)
        embed(client, "declined", traceparent=PARENT.removesuffix("01") + "00")
        embed(client, "alone")
        for number, broken in enumerate(
            ("", "00-zz-b7-01", PARENT[:-4], "ff" + PARENT[2:], PARENT + "-01" * 500)
        ):
            assert embed(client, f"broken-{number}", traceparent=broken).status_code == 200
    roots = collector.roots()
    assert set(roots) == {"asked"}, "with a share of 0 only those that ask for it"
    assert roots["asked"].trace_id.hex() == PARENT.split("-")[1]
    assert roots["asked"].parent_span_id.hex() == PARENT.split("-")[2]
    assert {span.trace_id for span in collector.spans} == {roots["asked"].trace_id}


def test_a_declined_trace_stays_declined_and_others_are_their_own(
    checkpoint: str, collector: Collector
) -> None:
    with traced(checkpoint, {"endpoint": collector.url}) as client:
        embed(client, "declined", traceparent=PARENT.removesuffix("01") + "00")
        embed(client, "one")
        embed(client, "two", traceparent="00-not-a-parent")
    roots = collector.roots()
    assert set(roots) == {"one", "two"}
    assert roots["one"].trace_id != roots["two"].trace_id


def test_a_share_of_requests(collector: Collector) -> None:
    tracer = open_tracer(TraceConfig(endpoint=collector.url, share=0.25))
    assert tracer is not None
    for number in range(1000):
        tracer.finished(Finished("GET", "/health", 200, 0.001, f"req_{number}", "-"))
    tracer.close()
    assert 190 <= len(collector.roots()) <= 310  # 250 ± 4.4 standard deviations


# --------------------------------------------------------------------------------------------------- the switch


def test_off_is_off() -> None:
    assert ServeConfig(checkpoint="x").trace.endpoint is None
    assert open_tracer(TraceConfig()) is None


@pytest.mark.parametrize(
    "missing", ["opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"]
)
def test_a_missing_package_is_named_with_its_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], ModuleSpec | None] = fmray.errors.find_spec
    monkeypatch.setattr(fmray.errors, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(MissingExtra) as raised:
        open_tracer(TraceConfig(endpoint="http://localhost:4318/v1/traces"))
    line = f"trace.endpoint needs {missing}, which is not installed: pip install 'fmray[trace]'"
    assert str(raised.value) == line


@pytest.mark.parametrize(
    "trace",
    [
        {"endpoint": "collector:4318"},
        {"endpoint": "http://user:word@collector:4318/v1/traces"},
        {"endpoint": "http://collector:4318/v1/traces x"},
        {"share": 1.5},
        {"share": -0.1},
    ],
)
def test_what_cannot_be_used_is_refused(trace: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=re.escape(next(iter(trace)))):
        TraceConfig.model_validate(trace)


def test_a_collector_that_is_gone_costs_no_request(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    trace = {"endpoint": f"http://127.0.0.1:{free_port()}/v1/traces"}
    with traced(checkpoint, trace) as client:
        started = time.monotonic()
        assert all(embed(client, f"req-{number}").status_code == 200 for number in range(20))
        assert time.monotonic() - started < 5
        ending = time.monotonic()
    assert time.monotonic() - ending < 10, "the endpoint ends all the same"
    assert PROMPT not in caplog.text


# ---------------------------------------------------------------------------------------------------- stages


def test_stages_are_those_of_their_request_and_bounded() -> None:
    async def request(number: int) -> list[Stage]:
        stages = begin_stages()
        await asyncio.sleep(0)
        for step in range(MOST_STAGES * 2):
            note_stage("infer", number, step)
            note_stage("infer", number, step)  # the next item of the same batch
            await asyncio.sleep(0)
        return stages

    async def together() -> list[list[Stage]]:
        return list(await asyncio.gather(*[request(number) for number in range(3)]))

    for number, stages in enumerate(asyncio.run(together())):
        assert stages == [Stage("infer", number, step) for step in range(MOST_STAGES)]
    note_stage("infer", 0.0, 1.0)  # outside a request: nobody's


def test_what_tracing_costs(collector: Collector) -> None:
    tracer = open_tracer(TraceConfig(endpoint=collector.url, share=0.0))
    assert tracer is not None
    now = time.perf_counter()
    stages = tuple(Stage(name, now - 0.01, now) for name in ("queue", "infer", "answer"))
    request = Finished("POST", "/v1/embeddings", 200, 0.02, "req_1", "-", "", stages)
    started = time.perf_counter()
    for _ in range(1000):
        tracer.finished(request)
    took = (time.perf_counter() - started) / 1000
    tracer.close()
    assert took < 0.001, "seconds of a request that is not kept"
