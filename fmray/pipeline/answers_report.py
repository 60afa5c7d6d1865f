"""The page of a model that answers about pictures: how it learned, what it gets right by type, what it gets wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmray.config.answers import AnswersConfig
from fmray.config.loading import dump_json, validate
from fmray.data.dialogues import DialogueSource, open_dialogues
from fmray.errors import DataError
from fmray.pipeline.charts import Line
from fmray.pipeline.replies_report import replies_sections, replies_tiles
from fmray.pipeline.report import render
from fmray.pipeline.sections import (
    Answer,
    Bars,
    Code,
    Exhibit,
    Gallery,
    LineChart,
    Matrix,
    Report,
    Section,
    Table,
    Tile,
)
from fmray.runtime.run_folder import RunFolder

PAGE = "report.html"
KINDS = 12
"""Types of questions whose bars are drawn, the most asked ones; the table holds all."""
SAID = 6
"""Different answers of people that are shown below a picture."""
BLIND = {"question_only": "question only", "majority": "majority"}
"""Baselines and their names on the page."""
SHARES = {
    "exact_match": "exact match",
    "vqa_accuracy": "VQA accuracy",
    "rank/sum": "caption first, by Σ log p",
    "rank/mean": "caption first, by mean log p",
    "rank/pmi": "caption first, by gain over a blank picture",
    **BLIND,
}
"""Metrics on the curve of what is right, at most as many as there are colours."""


def write_answers_report(folder: RunFolder) -> str:
    """report.html in the run's folder, one file that needs nothing else; returns its address.

    Raises DataError where the folder holds no evaluated run of a model that answers, or a picture is gone.
    """
    config = validate(AnswersConfig, _json(folder, "config.json"))
    source = open_dialogues(config.data.source, "test")
    sections = [*answers_sections(folder, source), Code("Resolved configuration", dump_json(config))]
    evaluation = _json(folder, "evaluation.json")
    subtitle = (
        f"{config.model.kind} on {config.data.source.kind}; step {evaluation.get('step', config.train.steps)}"
    )
    report = Report(f"fmray: {config.run.name}", subtitle, answers_tiles(evaluation), tuple(sections))
    folder.write_text(render(report), PAGE)
    return str(Path(folder.url) / PAGE) if folder.is_local else f"{folder.url}/{PAGE}"


def answers_sections(folder: RunFolder, source: DialogueSource) -> list[Section]:
    """Curves from metrics.jsonl, the rest from evaluation.json; pictures are read from the test split that was measured."""
    evaluation = _json(folder, "evaluation.json")
    if "replies" in evaluation:
        return [*curves(folder.metrics()), *replies_sections(evaluation, folder.metrics(), source)]
    count = evaluation["questions"]
    galleries = [
        gallery(
            "Wrong answers",
            evaluation["gallery"],
            source,
            f"{len(evaluation['gallery'])} that nobody gave, evenly spread over {count:,} test questions.",
        ),
        gallery(
            "Answers as they come",
            evaluation["examples"],
            source,
            f"{len(evaluation['examples'])} of {count:,} test questions, evenly spread, none chosen.",
        ),
    ]
    return [
        *curves(folder.metrics()),
        *kind_sections(evaluation),
        *ranking_section(evaluation),
        *(section for section in galleries if section.exhibits),
    ]


def answers_tiles(evaluation: Mapping[str, Any]) -> tuple[Tile, ...]:
    """The numbers to see first."""
    if "replies" in evaluation:
        return replies_tiles(evaluation)
    metrics, questions = evaluation["metrics"], f"{evaluation['questions']:,} test questions"
    blind = metrics.get("eval/question_only")
    notes = {
        "eval/exact_match": questions if blind is None else f"{blind:.3f} from the question alone",
        "eval/vqa_accuracy": "official rule",
        "eval/exact_match/not_yes_no": "without questions of yes and no",
        "eval/bleu4": "0 to 100, sacrebleu",
        "eval/rank/pmi": f"chance {evaluation.get('ranking', {}).get('chance', 0):.3f}",
    }
    names = {
        "eval/exact_match": "Exact match",
        "eval/vqa_accuracy": "VQA accuracy",
        "eval/exact_match/not_yes_no": "Exact match, open questions",
        "eval/bleu4": "BLEU-4",
        "eval/rank/pmi": "Right caption first",
    }
    return tuple(
        Tile(label, f"{metrics[name]:.1f}" if name == "eval/bleu4" else f"{metrics[name]:.3f}", notes[name])
        for name, label in names.items()
        if name in metrics
    )


# ------------------------------------------------------------------------------------------------------------- curves


def curves(reports: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Loss, what is right on the test split, and the learning rate, over steps; charts without a point are left out."""

    def line(key: str, name: str) -> Line:
        return Line(name, tuple((report["step"], report[key]) for report in reports if key in report))

    shares = tuple(drawn for key, name in SHARES.items() if (drawn := line(f"eval/{key}", name)).points)
    charts = [
        LineChart("Loss", (line("train/loss", "cross-entropy"),), "step", "nats a token"),
        LineChart("Right on the test split", shares, "step", "share", from_zero=True),
        LineChart("BLEU-4", (line("eval/bleu4", "BLEU-4"),), "step", "0 to 100", from_zero=True),
        LineChart("Learning rate", (line("train/learning_rate", "highest of the parts"),), "step", "rate"),
    ]
    return [chart for chart in charts if any(drawn.finite for drawn in chart.lines)]


# ------------------------------------------------------------------------------------------------------------ results


def kind_sections(evaluation: Mapping[str, Any]) -> list[Section]:
    """Exact match by type of question beside answers that need no picture, and which answer was said for which."""
    kinds = evaluation.get("kinds", [])
    if not kinds:
        return []
    most_asked = sorted(kinds, key=lambda row: -row["questions"])[:KINDS]
    amounts = tuple(
        (f"{row['kind'] or 'all'}, {name}", 100 * row[key])
        for row in most_asked
        for key, name in {"exact_match": "model", **BLIND}.items()
    )
    measured = [
        key for key in ("exact_match", "vqa_accuracy", "anls", *BLIND) if any(key in row for row in kinds)
    ]
    rows = tuple(
        (
            row["kind"] or "all",
            row["questions"],
            *(round(row[key], 3) if key in row else "–" for key in measured),
        )
        for row in kinds
    )
    note = (
        "Exact match. Question only: the most frequent training answer to the same question, which "
        f"{evaluation['unseen_questions']:.1%} of the test questions do not have. Majority: always "
        f"“{evaluation['majority_answer']}”."
    )
    columns = ("type", "questions", *((SHARES | {"anls": "ANLS"})[key] for key in measured))
    sections: list[Section] = [
        Bars("Right answers by type of question", amounts, "%", note),
        Table("Results by type of question", columns, rows),
    ]
    if evaluation.get("confusion") is not None:
        names, counts = evaluation["confusion"]["names"], evaluation["confusion"]["counts"]
        sections.append(
            Matrix("Which answer was said for which", tuple(names), tuple(tuple(row) for row in counts))
        )
    return sections


def ranking_section(evaluation: Mapping[str, Any]) -> list[Section]:
    """How often the right caption is the likeliest."""
    if "ranking" not in evaluation:
        return []
    metrics, ranking = evaluation["metrics"], evaluation["ranking"]
    keys = {
        key: name.removeprefix("caption first, ") for key, name in SHARES.items() if key.startswith("rank/")
    }
    amounts = [(name, 100 * metrics[f"eval/{key}"]) for key, name in keys.items()]
    note = f"Among {ranking['choices']} captions of test pictures, one of them right."
    return [
        Bars("The right caption is the likeliest", (*amounts, ("chance", 100 * ranking["chance"])), "%", note)
    ]


# ---------------------------------------------------------------------------------------------------------- galleries


def gallery(title: str, rows: Sequence[Mapping[str, Any]], source: DialogueSource, note: str) -> Gallery:
    """Pictures with the question, what the model said and what people did."""
    said = "First what the model said, with its score; then people's answers, each with the share of people who gave it."
    return Gallery(title, tuple(_exhibit(row, source) for row in rows), f"{note} {said}")


def _exhibit(row: Mapping[str, Any], source: DialogueSource) -> Exhibit:
    people, score = Counter(row["answers"]), float(row["score"])
    known = [Answer(text, many / people.total(), right=True) for text, many in people.most_common(SAID)]
    said = Answer(row["said"] or "(nothing)", score, right=score > 0)
    picture = None if row["picture"] is None else source.picture(row["picture"])
    badge = "right" if score == 1 else "wrong" if score == 0 else "in part"
    return Exhibit(row["question"] or row["name"], picture, (said, *known), badge, good=score > 0)


def _json(folder: RunFolder, name: str) -> dict[str, Any]:
    if not folder.exists(name):
        raise DataError(f"{folder.url}: holds no {name}; give the folder of a run that has been evaluated")
    content: dict[str, Any] = json.loads(folder.read_text(name))
    return content
