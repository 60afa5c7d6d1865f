"""Run by test_serve_autoscale in a process of its own: an endpoint that scales 1 → 4 → 0 → 1 on nodes that come and go.

`python -m tests.e2e.autoscale_scene CHECKPOINT FOLDER` writes FOLDER/timeline.json.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai

from fmray.pipeline.charts import Line
from fmray.pipeline.report import write_report
from fmray.pipeline.sections import LineChart, Report, Tile
from fmray.runtime.ports import free_port
from fmray.serving.deploy import app
from tests.e2e.fake_cloud import fake_cloud

ENVIRONMENT = {
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
"""Ray's own are ten seconds: what is tested is that it follows the traffic, not how slowly."""
MOST = 4
PATIENCE = 150.0


class Watch:
    """Replicas, nodes and answers, every half second."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.answered, self.failed = 0, [""][:0]
        self.phase = "start"
        self._began, self._going = time.monotonic(), True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        import ray
        from ray import serve

        before = 0
        while self._going:
            status = serve.status().applications.get("tiny")
            states = status.deployments["Model"].replica_states if status and status.deployments else {}
            nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
            self.rows.append(
                {
                    "second": round(time.monotonic() - self._began, 1),
                    "phase": self.phase,
                    "replicas": int(states.get("RUNNING", 0)),
                    "starting": int(states.get("STARTING", 0)),
                    "nodes": len(nodes),
                    "answers": self.answered - before,
                }
            )
            before = self.answered
            time.sleep(0.5)

    def wait(self, phase: str, **wanted: int) -> None:
        """Until the last row has these values; raises AssertionError where it does not come to that."""
        self.phase = phase
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self.rows and all(self.rows[-1][name] == value for name, value in wanted.items()):
                return
            time.sleep(0.25)
        raise AssertionError(f"{phase}: {wanted} not within {PATIENCE} s; {self.rows[-5:]}")

    def end(self) -> None:
        self._going = False
        self._thread.join(30)


def ask(url: str, watch: Watch, going: threading.Event) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", timeout=PATIENCE)
    while going.is_set():
        try:
            client.embeddings.create(model="tiny", input=["red"] * 8)
            watch.answered += 1
        except openai.OpenAIError as error:
            watch.failed.append(repr(error))


def scene(checkpoint: str, folder: Path) -> None:
    import ray

    with fake_cloud(folder, node={"CPU": 1, "GPU": 1}, most=MOST, environment=ENVIRONMENT) as address:
        ray.init(address, log_to_driver=False)
        try:
            play(checkpoint, folder)
        finally:  # before the head ends, or Ray ends this process without a word
            ray.shutdown()


def play(checkpoint: str, folder: Path) -> None:
    """The scene itself, on the cluster that this process is connected to."""
    from ray import serve
    from ray.serve.config import ProxyLocation

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options={"host": "127.0.0.1", "port": port})
    scale = {
        "min_replicas": 0,
        "max_replicas": MOST,
        "look_back_seconds": 3,
        "upscale_seconds": 1,
        "downscale_seconds": 6,
    }
    args = {
        "checkpoint": checkpoint,
        "model_id": "tiny",
        "runtime": {"kind": "ray", "threads": 1, "cpus_per_worker": 0.5, "gpus_per_worker": 1},
        "batch": {"max_items": 2},
        "scale": scale,
    }
    serve.run(app(args), name="tiny", route_prefix="/")
    watch = Watch()
    try:
        going = threading.Event()
        going.set()
        clients = [threading.Thread(target=ask, args=(url, watch, going)) for _ in range(12)]
        clients[0].start()
        watch.wait("one client", replicas=1)
        for client in clients[1:]:
            client.start()
        watch.wait("twelve clients", replicas=MOST, nodes=MOST)
        time.sleep(5)
        going.clear()
        for client in clients:
            client.join(PATIENCE)
        watch.wait("nobody", replicas=0, nodes=0)
        again = openai.OpenAI(base_url=f"{url}/v1", api_key="-", timeout=PATIENCE)
        watch.phase = "one request"
        again.embeddings.create(model="tiny", input="red")
        watch.answered += 1
        watch.wait("one request", replicas=1)
    finally:
        watch.end()
        told = {"rows": watch.rows, "failed": watch.failed, "answered": watch.answered}
        (folder / "timeline.json").write_text(json.dumps(told))
        write_report(timeline(watch.rows, watch.answered, watch.failed), folder / "timeline.html")
        serve.shutdown()


def timeline(rows: list[dict[str, Any]], answered: int, failed: list[str]) -> Report:
    """What happened, as a page."""

    def line(label: str, name: str, scale: float = 1.0) -> Line:
        return Line(label, tuple((row["second"], row[name] * scale) for row in rows))

    seconds = rows[-1]["second"]
    shown = LineChart(
        "Replicas and nodes follow the traffic",
        (line("replicas that answer", "replicas"), line("nodes with a GPU", "nodes")),
        "seconds",
        "count",
        from_zero=True,
        note="One client, then twelve, then nobody, then one request; nodes are added and taken by Ray's autoscaler.",
    )
    answers = LineChart(
        "Answers", (line("answers per second", "answers", 2.0),), "seconds", "answers / s", from_zero=True
    )
    tiles = (
        Tile("most replicas", str(max(row["replicas"] for row in rows))),
        Tile("requests answered", str(answered)),
        Tile("requests lost", str(len(failed))),
        Tile("seconds", f"{seconds:.0f}"),
    )
    subtitle = "An endpoint on Ray Serve, 1 → 4 → 0 → 1 replicas on a cluster of declared GPUs"
    return Report("Autoscaling", subtitle, tiles, (shown, answers))


if __name__ == "__main__":
    scene(sys.argv[1], Path(sys.argv[2]))
