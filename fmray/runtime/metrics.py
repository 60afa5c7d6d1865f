"""The one table of metric names, and the reporters that carry them: a file always, others when asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Literal

from tqdm import tqdm

from fmray.config.schema import ReportConfig
from fmray.errors import MissingExtra, ResourceError
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics

Reporter = Callable[[int, Metrics], None]

METRICS: dict[str, str] = {
    "train/loss": "Loss of the global batch.",
    "train/batch_accuracy": "Share of images whose nearest caption in the rank's batch is theirs, 0..1.",
    "train/logit_scale": "Exponentiated temperature that scales the cosines.",
    "train/gradient_norm": "Norm of the averaged gradient before clipping.",
    "train/learning_rate": "Highest learning rate of the parts.",
    "train/epoch": "Epoch of the batch's first sample, from 0.",
    "train/images_per_second": "Images of the global batch over the step's time.",
    "data/unreadable": "Samples of this epoch that could not be read and were replaced.",
    "time/step": "Seconds of the step, waiting for data included.",
    "time/data": "Seconds the step waited for data.",
    "time/evaluate": "Seconds of an evaluation.",
}
"""Name in files and trackers → what it means. Prometheus takes `fmray_` + the name with underscores; in Ray, Ray's exporter puts
`ray_` before that. Every `eval/…` value is a sample of the gauge `fmray_eval` with the label `metric`."""

EVALUATION = "eval/"


def prometheus_name(name: str) -> str:
    """`train/loss` → `fmray_train_loss`."""
    return "fmray_" + name.replace("/", "_")


class FileReporter:
    """Appends one JSON object per report to metrics.jsonl; a resumed run continues after the steps it kept."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def __call__(self, step: int, metrics: Metrics) -> None:
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics})
        if self._folder.is_local:
            self._folder.filesystem.makedirs(self._folder.path(), exist_ok=True)
            with open(self._folder.path("metrics.jsonl"), "a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:  # object stores cannot append
            before = self._folder.read_text("metrics.jsonl") if self._folder.exists("metrics.jsonl") else ""
            self._folder.write_text(f"{before}{line}\n", "metrics.jsonl")


def drop_reports_after(folder: RunFolder, step: int) -> None:
    """Cut from metrics.jsonl what a run that was killed reported after its last checkpoint; it will come again."""
    lines = folder.metrics()
    kept = [line for line in lines if line["step"] <= step]
    if len(kept) < len(lines):
        folder.write_text("".join(json.dumps(line) + "\n" for line in kept), "metrics.jsonl")


class TensorBoardReporter:
    """Event files under <run>/tensorboard."""

    def __init__(self, folder: RunFolder) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingExtra("tensorboard", "trackers", "report.tensorboard=true") from None
        self._writer: Any = SummaryWriter(
            folder.path("tensorboard") if folder.is_local else folder.url + "/tensorboard"
        )

    def __call__(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WandbReporter:
    """Weights & Biases, online or into <run>/wandb."""

    def __init__(self, folder: RunFolder, mode: Literal["online", "offline"], name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise MissingExtra("wandb", "trackers", f"report.wandb={mode}") from None
        place = folder.path() if folder.is_local else None
        self._run: Any = wandb.init(project="fmray", name=name, id=name, mode=mode, dir=place, resume="allow")

    def __call__(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)


class MlflowReporter:
    """An MLflow tracking server or folder."""

    def __init__(self, uri: str, name: str) -> None:
        try:
            import mlflow
        except ImportError:
            raise MissingExtra("mlflow", "trackers", f"report.mlflow={uri}") from None
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("fmray")
        self._mlflow: Any = mlflow
        self._run = mlflow.start_run(run_name=name)

    def __call__(self, step: int, metrics: Metrics) -> None:
        safe = {name.replace("@", "_at_"): value for name, value in metrics.items()}
        self._mlflow.log_metrics(safe, step=step)


class PrometheusReporter:
    """Local mode's own exporter on a port."""

    def __init__(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry = CollectorRegistry()
        self._gauges = {
            name: Gauge(prometheus_name(name), doc, registry=registry) for name, doc in METRICS.items()
        }
        self._eval = Gauge("fmray_eval", "A measure of the last evaluation.", ["metric"], registry=registry)
        self._step = Gauge("fmray_step", "Optimizer steps done.", registry=registry)
        try:
            self._server = start_http_server(port, registry=registry)
        except OSError as error:
            raise ResourceError(
                f"report.prometheus_port={port} cannot be opened: {error.strerror}; take another"
            ) from None

    def __call__(self, step: int, metrics: Metrics) -> None:
        self._step.set(step)
        for name, value in metrics.items():
            if name.startswith(EVALUATION):
                self._eval.labels(metric=name.removeprefix(EVALUATION)).set(value)
            else:
                self._gauges[name].set(value)


class ProgressBar:
    """One line on the terminal: step, loss, speed."""

    def __init__(self, steps: int, name: str) -> None:
        self._bar = tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0)

    def __call__(self, step: int, metrics: Metrics) -> None:
        self._bar.update(step - self._bar.n)
        if "train/loss" in metrics:
            speed = metrics["train/images_per_second"]
            self._bar.set_postfix_str(f"loss {metrics['train/loss']:.3f}, {speed:.0f} images/s")
        found = {name: value for name, value in metrics.items() if name.endswith(("/r1", "/r5"))}
        if found:
            shown = "  ".join(f"{name.removeprefix(EVALUATION)} {value:.3f}" for name, value in found.items())
            self._bar.write(f"step {step}: {shown}")

    def close(self) -> None:
        """Leave the line as it stands."""
        self._bar.close()


def make_reporters(report: ReportConfig, folder: RunFolder, name: str) -> list[Reporter]:
    """What rank 0 reports to, beside a terminal and Prometheus, which belong to the place it runs in."""
    reporters: list[Reporter] = [FileReporter(folder)]
    if report.tensorboard:
        reporters.append(TensorBoardReporter(folder))
    if report.wandb != "off":
        reporters.append(WandbReporter(folder, report.wandb, name))
    if report.mlflow is not None:
        reporters.append(MlflowReporter(report.mlflow, name))
    return reporters
