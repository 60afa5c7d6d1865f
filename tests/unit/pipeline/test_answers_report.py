"""The page of answers, drawn from what an evaluation of a real tiny model writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fmray.config.answers import AnswerEvaluateConfig, AnswersConfig
from fmray.config.base import RunConfig
from fmray.config.data import JsonlSource
from fmray.config.dialogues import CaptionSource, DialogueDataConfig, LabelSource
from fmray.config.loading import dump_json
from fmray.data.dialogues import DialogueSource, open_dialogues
from fmray.errors import DataError
from fmray.evaluation.answers import evaluate_answers
from fmray.pipeline.answers_report import (
    answers_sections,
    answers_tiles,
    gallery,
    kind_sections,
    write_answers_report,
)
from fmray.pipeline.report import render
from fmray.pipeline.sections import Bars, Gallery, LineChart, Matrix, Report, Section, Table
from fmray.runtime.run_folder import RunFolder
from tests.pictures import COLORS, SHAPES, draw
from tests.tiny_vqa import tiny_vqa
from tests.unit.evaluation.contexts import context

EVIL = "<script>alert(1)</script>"


def shapes(folder: Path) -> JsonlSource:
    """Twenty pictures with the shape's name, as a source of pairs; one name would like to be a script."""
    lines = []
    for index in range(20):
        color, shape = list(COLORS)[index % 5], SHAPES[index % 4]
        draw(color, shape, index).save(folder / f"{index}.png")
        name = EVIL if index == 3 else f"{color} {shape}"
        lines.append(json.dumps({"image": f"{index}.png", "caption": name}))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return JsonlSource(path=str(folder))


def evaluated(
    folder: Path, source: LabelSource | CaptionSource, **keys: Any
) -> tuple[RunFolder, DialogueSource]:
    """A run folder as a training leaves it behind: configuration, metrics of some steps, the evaluation."""
    config = AnswersConfig(
        run=RunConfig(name="run", storage=str(folder)), data=DialogueDataConfig(source=source)
    )
    home, test = RunFolder.of(config.run), open_dialogues(source, "test")
    evaluate = AnswerEvaluateConfig(batch_size=8, **keys)
    metrics, details = evaluate_answers(
        tiny_vqa(), test, evaluate, context(), open_dialogues(source, "train")
    )
    steps = [{"step": step, "train/loss": 1 / step, "train/learning_rate": 0.1} for step in (1, 2, 3)]
    lines = [json.dumps(line) for line in [*steps, {"step": 3, **metrics}]]
    home.write_text(dump_json(config), "config.json")
    home.write_text("\n".join(lines) + "\n", "metrics.jsonl")
    home.write_text(json.dumps({"step": 3, "metrics": metrics, **details}), "evaluation.json")
    return home, test


def titled(sections: list[Section]) -> dict[str, Section]:
    return {section.title: section for section in sections}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, DialogueSource]:
    folder = tmp_path_factory.mktemp("questions")
    return evaluated(folder, LabelSource(pairs=shapes(folder)), gallery=5)


def test_curves_types_and_galleries(questions: tuple[RunFolder, DialogueSource]) -> None:
    home, source = questions
    evaluation = json.loads(home.read_text("evaluation.json"))
    found = titled(answers_sections(home, source))
    assert list(found) == [
        "Loss",
        "Right on the test split",
        "Learning rate",
        "Right answers by type of question",
        "Results by type of question",
        "Which answer was said for which",
        "Wrong answers",
        "Answers as they come",
    ]
    loss, right = found["Loss"], found["Right on the test split"]
    assert isinstance(loss, LineChart)
    assert [x for x, _ in loss.lines[0].points] == [1, 2, 3]
    assert isinstance(right, LineChart)
    assert {line.name for line in right.lines} == {"exact match", "question only", "majority"}
    bars, table, matrix = (found[title] for title in list(found)[3:6])
    assert isinstance(bars, Bars)
    assert len(bars.amounts) == 6
    assert bars.amounts[1][0].endswith("question only")
    assert bars.amounts[1][1] == pytest.approx(100 * evaluation["kinds"][0]["question_only"])
    assert isinstance(table, Table)
    assert {row[0] for row in table.rows} == {"templated what", "templated yes/no"}
    assert isinstance(matrix, Matrix)
    assert sum(map(sum, matrix.counts)) == 40
    wrong = found["Wrong answers"]
    assert isinstance(wrong, Gallery)
    assert len(wrong.exhibits) == 5
    for exhibit, row in zip(wrong.exhibits, evaluation["gallery"], strict=True):
        assert exhibit.picture == source.picture(row["picture"])
        assert exhibit.answers[0].text == (row["said"] or "(nothing)")
        assert not exhibit.answers[0].right
        assert [answer.text for answer in exhibit.answers[1:]] == row["answers"]
        assert exhibit.badge == "wrong"


def test_the_page_needs_nothing_else_and_holds_no_script(questions: tuple[RunFolder, DialogueSource]) -> None:
    home, _ = questions
    page = Path(write_answers_report(home)).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("<img") == 5 + 12
    assert "Exact match, open questions" in page
    assert "vqa on labels; step 3" in page


def test_captions_have_bleu_and_ranking(tmp_path: Path) -> None:
    source = CaptionSource(pairs=shapes(tmp_path))
    home, test = evaluated(tmp_path, source, choices=4)
    found = titled(answers_sections(home, test))
    assert "Right answers by type of question" not in found
    ranking = found["The right caption is the likeliest"]
    assert isinstance(ranking, Bars)
    assert [name for name, _ in ranking.amounts][-1] == "chance"
    assert ranking.amounts[-1][1] == 25
    evaluation = json.loads(home.read_text("evaluation.json"))
    assert [tile.label for tile in answers_tiles(evaluation)] == [
        "Exact match",
        "BLEU-4",
        "Right caption first",
    ]
    shown = found["Answers as they come"]
    assert isinstance(shown, Gallery)
    assert shown.exhibits[0].title  # nothing was asked: the picture's name


def test_partial_agreement_and_people_by_share(questions: tuple[RunFolder, DialogueSource]) -> None:
    _, source = questions
    row = {
        "name": "n",
        "picture": None,
        "question": "how many?",
        "said": "two",
        "answers": ["2"] * 6 + ["3"] * 3 + ["4"],
        "score": 0.6,
    }
    (exhibit,) = gallery("t", [row], source, "").exhibits
    assert (exhibit.badge, exhibit.good, exhibit.picture) == ("in part", True, None)
    assert [(a.text, a.score) for a in exhibit.answers] == [("two", 0.6), ("2", 0.6), ("3", 0.3), ("4", 0.1)]


def test_only_the_most_asked_types_have_bars() -> None:
    kinds = [
        {
            "kind": f"k{i}",
            "questions": i,
            "exact_match": 0.5,
            "vqa_accuracy": 0.4,
            "question_only": 0.2,
            "majority": 0.1,
        }
        for i in range(30)
    ]
    evaluation = {"kinds": kinds, "unseen_questions": 0.5, "majority_answer": "yes", "confusion": None}
    bars, table = kind_sections(evaluation)
    assert isinstance(bars, Bars)
    assert bars.amounts[0] == ("k29, model", 50.0)
    assert len(bars.amounts) == 36
    assert isinstance(table, Table)
    assert len(table.rows) == 30
    assert table.columns == ("type", "questions", "exact match", "VQA accuracy", "question only", "majority")
    assert "k29" in render(Report("t", "s", (), (bars, table)))


def test_a_folder_without_an_evaluation_is_one_line(tmp_path: Path) -> None:
    wanted = r"^.*: holds no config\.json; give the folder of a run that has been evaluated$"
    with pytest.raises(DataError, match=wanted):
        write_answers_report(RunFolder(str(tmp_path)))
