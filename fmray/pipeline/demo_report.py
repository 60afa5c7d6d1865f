"""The demo's page: what was found, drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fmray.config.demo import RUNS, DemoConfig
from fmray.config.loading import dump_json
from fmray.config.schema import PretrainConfig
from fmray.data.dialogues import DialogueSource
from fmray.pipeline.answers_report import answers_sections
from fmray.pipeline.charts import Line
from fmray.pipeline.demo_clip import ClipPart
from fmray.pipeline.demo_rlhf import RlhfPart
from fmray.pipeline.demo_vqa import VqaPart
from fmray.pipeline.report import write_report
from fmray.pipeline.rlhf_report import ppo_curves, reward_model_sections, side_by_side, verdict_table
from fmray.pipeline.scatter import Point
from fmray.pipeline.sections import (
    Answer,
    Bars,
    Code,
    Exhibit,
    Gallery,
    LineChart,
    Report,
    ScatterChart,
    Section,
    Table,
    Text,
    Tile,
)
from fmray.pipeline.sweep_report import table as trial_table
from fmray.pipeline.sweep_report import trade_off
from fmray.pipeline.verdict import first_and_last


def write_demo_report(
    summary: dict[str, Any],
    clip: ClipPart | None,
    vqa: VqaPart | None,
    rlhf: RlhfPart | None,
    config: DemoConfig,
    folder: Path,
) -> Path:
    """report.html in the demo's folder, one file that needs nothing else."""
    sections: tuple[Section, ...] = (
        *(clip_sections(clip) if clip else ()),
        *(vqa_sections(vqa) if vqa else ()),
        *(rlhf_sections(rlhf) if rlhf else ()),
        Text("About this demo", about(config, folder)),
        Bars("Where the time went", tuple(summary["seconds"].items()), "s", "Of the last start."),
        Table("Versions", ("package", "version"), tuple(summary["versions"].items())),
        Table("Machine", ("", ""), tuple((key, str(value)) for key, value in summary["machine"].items())),
        Code("Resolved configuration", dump_json(config)),
    )
    tiles = (
        *(clip_tiles(summary) if clip else ()),
        *(vqa_tiles(summary) if vqa else ()),
        *(rlhf_tiles(summary) if rlhf else ()),
    )
    ran = (("CLIP", clip), ("VQA", vqa), ("PPO", rlhf))
    places = [f"{name} in {place(part)}" for name, part in ran if part]
    subtitle = f"{'; '.join(places)}; {summary['machine']['cpu']}; {summary['machine']['date']}"
    return write_report(Report("fmray demo", subtitle, tiles, sections), folder / "report.html")


def about(config: DemoConfig, folder: Path) -> str:
    """Where everything lies."""
    names = ", ".join(getattr(config, part).run.name for part in RUNS)
    return (
        f"Each part is a run of its own under {folder.name}/ ({names}), with its configuration, metrics.jsonl and "
        "checkpoints; summary.json holds this page's numbers."
    )


def place(part: ClipPart | VqaPart | RlhfPart) -> str:
    """Where a part ran: `Ray, 2 learners, DeepSpeed ZeRO-2`."""
    config = part.runs.rlhf if isinstance(part, RlhfPart) else part.config
    if config.runtime.kind == "local":
        where = "one process"
    else:
        pools = " and actor pools" if isinstance(part, RlhfPart) else ""
        where = f"Ray, {config.runtime.workers} learner(s){pools}"
    engine = "torch" if config.engine.kind == "torch" else f"DeepSpeed ZeRO-{config.engine.zero_stage}"
    return f"{where}, {engine}"


# ---------------------------------------------------------------------------------------------------------------- CLIP


def clip_sections(part: ClipPart) -> list[Section]:
    """Curves, galleries, the endpoint's answers."""
    source = part.config.data.source.kind
    words = (
        f"A picture tower and a text tower learn from {source} pairs which caption belongs to which picture; the test "
        "pictures' concepts were never seen. Then the model is served, and a stock client asks it."
    )
    return [
        Text("CLIP: pictures and their captions", words),
        *curves(part.reports, part.config),
        *part.galleries,
        conversation(part.conversation),
    ]


def clip_tiles(summary: dict[str, Any]) -> tuple[Tile, ...]:
    """The numbers to see first."""
    clip, seconds = summary["clip"], summary["seconds"]
    results, train = clip["results"], clip["train"]
    latency = sorted(turn["milliseconds"] for turn in clip["endpoint"])
    found = [
        Tile(
            "R@1, picture → name",
            f"{results['eval/image_to_text/r1']:.3f}",
            "concepts never seen in training",
        ),
        Tile("R@5, picture → name", f"{results['eval/image_to_text/r5']:.3f}", "among all unseen names"),
        Tile(
            "CLIP loss",
            f"{train['last_loss']:.3f}",
            f"from {train['first_loss']:.3f} in {train['steps']} steps",
        ),
        Tile("CLIP training", f"{seconds['training']:.0f} s", f"{train['step_seconds']:.2f} s a step"),
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


# ----------------------------------------------------------------------------------------------------------------- VQA


def vqa_sections(part: VqaPart) -> list[Section]:
    """How it learned, what is right by type beside answers that need no picture, what is wrong, the dialogue."""
    model, source = part.config.model, part.source
    words = (
        f"A model that answers ({model.kind}) learns from {part.config.data.source.kind} questions about pictures. It is "
        "measured on pictures that it has not seen, beside two that see none: the question alone, and always the same "
        "answer. Then it is served, and a stock client asks it."
    )
    return [
        Text("VQA: questions about pictures", words),
        *answers_sections(part.folder, source),
        dialogue_gallery(part.conversation, source),
    ]


def dialogue_gallery(turns: list[dict[str, Any]], source: DialogueSource) -> Gallery:
    """What the endpoint answered, picture by picture."""
    by_picture: dict[str, list[dict[str, Any]]] = {}
    for turn in turns:
        by_picture.setdefault(turn["picture"], []).append(turn)
    exhibits = []
    for key, asked in by_picture.items():
        right = sum(turn["score"] > 0 for turn in asked)
        exhibits.append(
            Exhibit(
                key,
                source.picture(key),
                tuple(
                    Answer(exchange(turn), turn["milliseconds"] / 1000, turn["score"] > 0) for turn in asked
                ),
                f"{right} of {len(asked)} right",
                good=right == len(asked),
            )
        )
    note = (
        "Test pictures and their questions through /v1/chat/completions, each question in a request of its own; behind "
        "the answer the seconds that the client waited for it."
    )
    return Gallery("The VQA endpoint, asked with the openai client", tuple(exhibits), note)


def exchange(turn: dict[str, Any]) -> str:
    """`what color is it? → red`, and where that is wrong what is right."""
    said = f"{turn['question']} → {turn['said'] or '(nothing)'}"
    return said if turn["score"] > 0 else f"{said} (right: {', '.join(turn['right'])})"


def vqa_tiles(summary: dict[str, Any]) -> tuple[Tile, ...]:
    """The numbers to see first."""
    vqa, seconds = summary["vqa"], summary["seconds"]
    results, train = vqa["results"], vqa["train"]
    latency = sorted(turn["milliseconds"] for turn in vqa["endpoint"])
    blind = f"{results['eval/question_only']:.3f} from the question alone, {results['eval/majority']:.3f} always the same"
    found = [Tile("VQA, right answers", f"{results['eval/exact_match']:.3f}", blind)]
    if "eval/exact_match/not_yes_no" in results:
        open_ended = f"{results['eval/exact_match/not_yes_no']:.3f}"
        found.append(Tile("VQA, open questions", open_ended, "without questions of yes and no"))
    return (
        *found,
        Tile("VQA training", f"{seconds['VQA training']:.0f} s", f"{train['step_seconds']:.2f} s a step"),
        Tile("Endpoint, one question", f"{latency[len(latency) // 2]:.0f} ms", "median, openai client"),
    )


# ---------------------------------------------------------------------------------------------------------------- RLHF


def rlhf_sections(part: RlhfPart) -> list[Section]:
    """The verdict first, then the answers, the curves, the reward model, the sweep."""
    config = part.runs.rlhf
    rewards = ", ".join(f"{name} {reward.weight:g}" for name, reward in config.rewards.items())
    words = (
        f"A policy ({config.policy.source}) continues reviews whose first words it is given. PPO teaches it to earn more of its "
        f"weighted rewards ({rewards}) without going far from where it started. The sentiment reward is a model that was "
        "trained here a minute before, on people's labels."
    )
    return [
        Text("PPO: a language model under weighted rewards", words),
        verdict_table(part.findings, len(part.before.prompts)),
        side_by_side(part.before, part.after),
        *ppo_curves(part.reports, config, part.held_out),
        *reward_model_sections(part.reward_reports, part.reward_evaluation),
        *sweep_sections(part),
    ]


def sweep_sections(part: RlhfPart) -> list[Section]:
    """The trade-off with the place where all trials start, and the trials."""
    rows, trials = part.sweep.rows, part.trials
    sections: list[Section] = []
    if (axes := trials.sweep.pareto) is not None:
        sections.append(with_start(trade_off(rows, trials), part, axes.x.metric, axes.y.metric))
    trials_table = trial_table(rows, trials)
    steps = trials.config(0).train.iterations
    note = (
        f"PPO runs of {steps} iterations each, otherwise as the run above but for the keys under sweep.base."
    )
    return [*sections, without_empty_columns(replace(trials_table, title="Sweep: trials", note=note))]


def without_empty_columns(table: Table) -> Table:
    """The table without columns that say nothing."""
    kept = [i for i in range(len(table.columns)) if any(row[i] != "" for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return replace(table, columns=tuple(table.columns[i] for i in kept), rows=rows)


def with_start(chart: ScatterChart, part: RlhfPart, x: str, y: str) -> ScatterChart:
    """The chart with the starting policy as a point without colour."""
    start, _ = first_and_last(part.reports)
    points = (
        (*chart.points, Point("starting policy", start[x], start[y]))
        if x in start and y in start
        else chart.points
    )
    note = f"{chart.note} The empty circle is the starting policy."
    return replace(chart, title="Sweep: trade-off", points=points, note=note)


def rlhf_tiles(summary: dict[str, Any]) -> tuple[Tile, ...]:
    """The numbers to see first."""
    found = summary["rlhf"]
    rows = {row["what"]: row for row in found["verdict"]}
    first, kl = rows["weighted reward"], rows["KL"]
    second = [row["met"] for what, row in rows.items() if "second judge" in what]
    tiles = [
        Tile(
            "Weighted reward",
            f"{first['after']:+.2f}",
            f"deviations of the starting policy's, in {found['iterations']} iterations of PPO",
        ),
        Tile("Second judges that agree", f"{sum(second)} of {len(second)}", "none was trained against"),
        Tile("KL to the start", f"{kl['after']:.1f}", f"nats an answer, {kl['bar']}"),
    ]
    right = {name: value for name, value in found["reward_model"].items() if name.endswith("/accuracy")}
    for name, value in list(right.items())[:1]:
        part = name.split("/")[1].replace("_", " ")
        tiles.append(Tile("Reward model", f"{value:.3f}", f"right about held-out texts ({part})"))
    return tuple(tiles)
