"""The one table of metric names, and the reporters that carry them: a file always, others when asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

from tqdm import tqdm

from fmray.config.schema import ReportConfig
from fmray.errors import MissingExtra, ResourceError
from fmray.runtime.run_folder import RunFolder
from fmray.types import Metrics

Reporter = Callable[[int, Metrics], None]

METRICS: dict[str, str] = {
    "train/loss": "Loss of the global batch.",
    "train/reply_loss": "What of it answers of pictures added: cosine and contrast of the output side's projector.",
    "train/batch_accuracy": "Share of images whose nearest caption in the rank's batch is theirs, 0..1.",
    "train/accuracy": "Share of the batch's labels, or of its pairs of answers, judged as people did, 0..1.",
    "train/logit_scale": "Exponentiated temperature that scales the cosines.",
    "train/gradient_norm": "Norm of the averaged gradient before clipping.",
    "train/learning_rate": "Highest learning rate of the parts.",
    "train/epoch": "Epoch of the batch's first sample, from 0.",
    "train/images_per_second": "Images of the global batch over the step's time.",
    "data/unreadable": "Samples of this epoch that could not be read and were replaced.",
    "time/step": "Seconds of the step, waiting for data included.",
    "time/data": "Seconds the step waited for data.",
    "time/evaluate": "Seconds of an evaluation.",
    "time/act": "Seconds the rank waited for rollouts.",
    "time/judge": "Seconds it waited, after that, for reference and rewards.",
    "time/credit": "Seconds of the learner's own forward passes and of the advantages.",
    "time/learn": "Seconds of the optimizer steps.",
    "time/refresh": "Seconds of publishing the weights and loading them in every replica.",
    "train/samples_per_second": "Samples of a step or iteration over its time.",
    "train/tokens_per_second": "Tokens of a step (of an iteration: response tokens) over its time.",
    "ppo/kl": "KL to the reference policy of a whole answer, in nats, mean over samples.",
    "ppo/kl_coefficient": "Weight of the KL penalty.",
    "ppo/score": "Combined reward of a sample, after the missing-EOS rule.",
    "ppo/rlhf_reward": "Combined reward minus the KL penalty.",
    "ppo/entropy": "Entropy of the policy at a response token, in nats.",
    "ppo/length": "Response tokens of a sample.",
    "ppo/eos_rate": "Share of samples that ended by themselves.",
    "ppo/staleness": "Published versions between the weights that made a sample and the learner's, mean.",
    "ppo/logp_difference": "Mean |learner's - rollout policy's log-probability| of a token, in nats.",
    "ppo/importance": "Mean importance weight, truncated.",
    "ppo/importance_truncated": "Share of tokens whose importance weight was truncated.",
    "ppo/explained_variance": "Share of the returns' variance that the critic foresaw.",
    "ppo/policy_loss": "Clipped policy loss, mean over tokens and steps.",
    "ppo/value_loss": "Clipped value loss, mean over tokens and steps.",
    "ppo/value_clip_fraction": "Share of tokens whose value was clipped.",
    "ppo/value_error": "Mean squared error of the values.",
    "ppo/clip_fraction": "Share of tokens whose ratio was clipped.",
    "ppo/approx_kl": "Half the mean squared change of log-probability since the samples were credited.",
    "ppo/ratio_mean": "Mean of new over old probability.",
    "ppo/ratio_var": "Variance of that ratio.",
}
"""Name in files and trackers → what it means. Prometheus takes `fmray_` + the name with underscores; in Ray, Ray's exporter puts
`ray_` before that."""

EVALUATION = "eval/"

FAMILIES: dict[str, tuple[str, str]] = {
    EVALUATION: ("fmray_eval", "A measure of the last evaluation."),
    "reward/": ("fmray_reward", "A reward of the last iteration: raw and normalised means and deviations."),
}
"""Names that a configuration makes: every `eval/…` value is a sample of the gauge `fmray_eval` with the label `metric`."""


def family_of(name: str) -> str | None:
    """The prefix of a family that the name belongs to, if any."""
    return next((prefix for prefix in FAMILIES if name.startswith(prefix)), None)


@runtime_checkable
class ShowsSamples(Protocol):
    """A reporter that also takes tables of sample texts."""

    def show_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Rows with the same keys: texts and numbers."""
        ...


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

    def show_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """`samples/step-00000010.json`: a list of rows."""
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        self._folder.write_text(text + "\n", "samples", f"step-{step:08d}.json")


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

    def show_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """The rows as a Markdown table."""
        columns = list(rows[0])
        lines = [columns, ["---"] * len(columns)]
        lines += [[str(row[name]).replace("|", "\\|").replace("\n", " ") for name in columns] for row in rows]
        self._writer.add_text("samples", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
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

    def show_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """The rows as a W&B table."""
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._run.log({"samples": table}, step=step)


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

    def show_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """The rows as a JSON artifact."""
        self._mlflow.log_dict({"rows": rows}, f"samples/step-{step:08d}.json")


class PrometheusReporter:
    """Local mode's own exporter on a port."""

    def __init__(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry = CollectorRegistry()
        self._gauges = {
            name: Gauge(prometheus_name(name), doc, registry=registry) for name, doc in METRICS.items()
        }
        self._families = {
            prefix: Gauge(name, doc, ["metric"], registry=registry)
            for prefix, (name, doc) in FAMILIES.items()
        }
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
            if (family := family_of(name)) is not None:
                self._families[family].labels(metric=name.removeprefix(family)).set(value)
            else:
                self._gauges[name].set(value)


SHOWN = {
    "train/loss": "loss {:.3f}",
    "train/accuracy": "accuracy {:.2f}",
    "ppo/score": "score {:.3f}",
    "ppo/kl": "kl {:.2f}",
    "train/images_per_second": "{:.0f} images/s",
    "train/samples_per_second": "{:.1f} samples/s",
}
"""What stands behind the progress bar."""
HEADLINES = (
    *("/r1", "/r5", "eval/score", "eval/kl", "/accuracy"),
    *("eval/exact_match", "/vqa_accuracy", "/bleu4", "/rank/pmi"),
)
"""Endings of the evaluation metrics that are printed as they come."""


class ProgressBar:
    """One line on the terminal: step, loss, speed."""

    def __init__(self, steps: int, name: str) -> None:
        self._bar = tqdm(total=steps, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0)

    def __call__(self, step: int, metrics: Metrics) -> None:
        self._bar.update(step - self._bar.n)
        shown = [form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics]
        if shown:
            self._bar.set_postfix_str(", ".join(shown))
        found = {name: value for name, value in metrics.items() if name.endswith(HEADLINES)}
        if found:
            line = "  ".join(f"{name.removeprefix(EVALUATION)} {value:.3f}" for name, value in found.items())
            self._bar.write(f"step {step}: {line}")

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
