"""The demo's page: what was found, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmray.config.loading import dump_json
from fmray.config.schema import PretrainConfig
from fmray.pipeline.charts import Line
from fmray.pipeline.report import (
    Bars,
    Code,
    Gallery,
    LineChart,
    Matrix,
    Report,
    Section,
    Table,
    Tile,
    write_report,
)


def write_demo_report(
    summary: dict[str, Any],
    reports: list[dict[str, Any]],
    config: PretrainConfig,
    galleries: list[Gallery | Matrix],
    folder: Path,
) -> Path:
    """report.html in the run folder, one file that needs nothing else."""
    sections: tuple[Section, ...] = (
        *curves(reports, config),
        *galleries,
        conversation(summary["endpoint"]),
        Bars("Where the time went", tuple(summary["seconds"].items()), "s"),
        Table("Versions", ("package", "version"), tuple(summary["versions"].items())),
        Table("Machine", ("", ""), tuple((key, str(value)) for key, value in summary["machine"].items())),
        Code("Resolved configuration", dump_json(config)),
    )
    place = "one process" if config.runtime.kind == "local" else f"Ray, {config.runtime.workers} workers"
    engine = "torch" if config.engine.kind == "torch" else f"DeepSpeed ZeRO-{config.engine.zero_stage}"
    subtitle = f"{place}, {engine}, {config.engine.precision}; {summary['machine']['cpu']}; {summary['machine']['date']}"
    return write_report(
        Report("fmray demo: CLIP on emoji", subtitle, tiles(summary), sections), folder / "report.html"
    )


def tiles(summary: dict[str, Any]) -> tuple[Tile, ...]:
    """The numbers to see first."""
    results, train, seconds = summary["results"], summary["train"], summary["seconds"]
    latency = sorted(turn["milliseconds"] for turn in summary["endpoint"])
    found = [
        Tile(
            "R@1, picture → name",
            f"{results['eval/image_to_text/r1']:.3f}",
            "concepts never seen in training",
        ),
        Tile("R@5, picture → name", f"{results['eval/image_to_text/r5']:.3f}", "among all unseen names"),
        Tile(
            "Loss", f"{train['last_loss']:.3f}", f"from {train['first_loss']:.3f} in {train['steps']} steps"
        ),
        Tile("Training", f"{seconds['training']:.0f} s", f"{train['step_seconds']:.2f} s a step"),
    ]
    if latency:
        found.append(
            Tile("Endpoint, one picture", f"{latency[len(latency) // 2]:.0f} ms", "median, openai client")
        )
    return tuple(found)


def curves(reports: list[dict[str, Any]], config: PretrainConfig) -> list[LineChart]:
    """Loss, recall and learning rate over steps."""

    def points(name: str) -> tuple[tuple[float, float], ...]:
        return tuple((line["step"], line[name]) for line in reports if name in line)

    recall = []
    for language in config.evaluate.languages:
        prefix = "eval" if language == "en" else f"eval/{language}"
        for k in (1, 5, 10):
            recall.append(Line(f"{language} R@{k}", points(f"{prefix}/image_to_text/r{k}")))
    return [
        LineChart("Loss", (Line("contrastive loss", points("train/loss")),), "step", "loss"),
        LineChart("Recall, picture → name", tuple(recall), "step", "recall", from_zero=True),
        LineChart(
            "Learning rate", (Line("highest of the parts", points("train/learning_rate")),), "step", "rate"
        ),
    ]


def conversation(turns: list[dict[str, Any]]) -> Table:
    """What the endpoint answered."""
    rows = tuple(
        (
            turn["picture"],
            ", ".join(f"{answer['name']} ({answer['cosine']:.2f})" for answer in turn["answers"]),
            f"{turn['milliseconds']:.1f}",
        )
        for turn in turns
    )
    note = "Embeddings of test pictures and of 100 names through /v1/embeddings; nearest names by cosine."
    return Table(
        "The endpoint, asked with the openai client",
        ("picture", "nearest names", "ms"),
        rows,
        note,
        wide=True,
    )
