"""The demo's VQA part on a tiny real model: a real endpoint asked with the openai client, what the page and the screen say."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import pytest

from fmray.config.answers import AnswerEvaluateConfig, AnswersConfig
from fmray.config.base import RunConfig
from fmray.config.data import JsonlSource
from fmray.config.dialogues import DialogueDataConfig, LabelSource
from fmray.data.dialogue_loader import decoded_pictures
from fmray.data.dialogues import ListedDialogues, open_dialogues
from fmray.errors import DataError
from fmray.evaluation.answers import evaluate_answers
from fmray.pipeline.demo_report import dialogue_gallery, exchange, vqa_sections, vqa_tiles
from fmray.pipeline.demo_screen import vqa_lines
from fmray.pipeline.demo_vqa import MODEL_ID, VqaPart, chosen, converse, messages, of_all_types
from fmray.pipeline.report import render
from fmray.pipeline.sections import Gallery, Report, Text
from fmray.runtime.run_folder import RunFolder
from fmray.serving.chat_engine import AnswerEngine
from fmray.serving.chat_schemas import Message
from fmray.serving.conversations import ChatLimits, read_conversation
from fmray.types import Dialogue, Pictures, Turn
from tests.endpoint import app_of, serving
from tests.pictures import COLORS, SHAPES, draw
from tests.tiny_vqa import tiny_vqa
from tests.unit.evaluation.contexts import context


class Drawings:
    """A reader of pictures by number."""

    def read(self, key: str) -> bytes:
        stream = io.BytesIO()
        draw("red", "circle", int(key)).save(stream, "PNG")
        return stream.getvalue()


def asked(picture: str, question: str, kind: str, answer: str = "red") -> Dialogue:
    return Dialogue(f"{picture}: {question}", (picture,), (Turn(("", question), answer),), kind=kind)


def listed(dialogues: Sequence[Dialogue]) -> ListedDialogues:
    return ListedDialogues(tuple(dialogues), Drawings())


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> VqaPart:
    """A run as a training leaves it behind, and a conversation with its model through a real endpoint."""
    folder = tmp_path_factory.mktemp("vqa")
    lines = []
    for index in range(20):
        color, shape = list(COLORS)[index % 5], SHAPES[index % 4]
        draw(color, shape, index).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "caption": shape}))
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = LabelSource(pairs=JsonlSource(path=str(folder)))
    config = AnswersConfig(
        run=RunConfig(name="vqa", storage=str(folder)), data=DialogueDataConfig(source=source)
    )
    home, test, answering = RunFolder.of(config.run), open_dialogues(source, "test"), tiny_vqa()
    measure = AnswerEvaluateConfig(batch_size=8, gallery=5)
    metrics, details = evaluate_answers(answering, test, measure, context(), open_dialogues(source, "train"))
    steps = [{"step": step, "train/loss": 1 / step, "time/step": 0.5} for step in (1, 2, 4)]
    home.write_text("\n".join(map(json.dumps, [*steps, {"step": 4, **metrics}])) + "\n", "metrics.jsonl")
    home.write_text(json.dumps({"step": 4, "metrics": metrics, **details}), "evaluation.json")
    answering.model.eval()
    app = app_of(AnswerEngine(answering, "vqa", max_pixels=10**6), MODEL_ID)
    with serving(app) as address:
        conversation = converse(test, address)
    return VqaPart(config, conversation)


def test_the_endpoint_says_what_the_model_says(part: VqaPart) -> None:
    answering = tiny_vqa()
    answering.model.eval()
    pictures = list(dict.fromkeys(turn["picture"] for turn in part.conversation))
    assert len(pictures) == 6
    dialogues = chosen(part.source)
    assert [turn["question"] for turn in part.conversation] == [each.question for each in dialogues]
    for turn, dialogue in zip(part.conversation, dialogues, strict=True):
        directly = answering.answer([dialogue], decoded(part, dialogue))[0].text
        assert turn["said"] == directly
        assert turn["right"] == [dialogue.turns[-1].answer]
        assert turn["score"] == float(turn["said"] == turn["right"][0])
        assert turn["milliseconds"] > 0


def decoded(part: VqaPart, dialogue: Dialogue) -> Pictures:
    return decoded_pictures(part.source, dialogue.pictures, image=tiny_vqa().image)


def test_the_summary_holds_what_was_measured(part: VqaPart) -> None:
    summary, evaluation = part.summary, part.evaluation
    assert summary["results"] == evaluation["metrics"]
    assert summary["questions"] == 40
    train = {"steps": 4, "first_loss": 1.0, "last_loss": 0.25, "step_seconds": 0.5}
    assert summary["train"] == train
    json.dumps(summary)


def test_sections_show_curves_baselines_errors_and_the_dialogue(part: VqaPart) -> None:
    sections = vqa_sections(part)
    titles = [section.title for section in sections]
    assert isinstance(sections[0], Text)
    assert titles[1:3] == ["Loss", "Right on the test split"]
    assert {"Right answers by type of question", "Results by type of question", "Wrong answers"} <= set(
        titles
    )
    shown = sections[-1]
    assert isinstance(shown, Gallery)
    assert len(shown.exhibits) == 6
    assert sum(len(exhibit.answers) for exhibit in shown.exhibits) == len(part.conversation)
    assert all(exhibit.picture == part.source.picture(exhibit.title) for exhibit in shown.exhibits)
    page = render(Report("t", "s", (), tuple(sections)))
    assert "asked with the openai client" in page


def test_tiles_stand_beside_the_blind(part: VqaPart) -> None:
    summary = {"vqa": part.summary, "seconds": {"VQA training": 12.4}}
    tiles = {tile.label: tile for tile in vqa_tiles(summary)}
    results = part.evaluation["metrics"]
    assert tiles["VQA, right answers"].value == f"{results['eval/exact_match']:.3f}"
    assert f"{results['eval/question_only']:.3f} from the question alone" in tiles["VQA, right answers"].note
    assert tiles["VQA training"].value == "12 s"
    assert tiles["Endpoint, one question"].value.endswith(" ms")


def test_the_screen_has_a_row_for_each_type(part: VqaPart) -> None:
    lines = list(vqa_lines(part))
    assert lines[0] == "VQA, 4 steps: loss 1.000 → 0.250"
    rows = {line[:42].strip(): line[42:].split() for line in lines if line.startswith("  ")}
    results = part.evaluation["metrics"]
    wanted = [results[f"eval/{key}"] for key in ("exact_match", "question_only", "majority")]
    assert rows["all"] == [f"{value:.3f}" for value in wanted]
    assert {"templated what", "templated yes/no"} <= rows.keys()
    assert sum("ms)" in line for line in lines) == 4


def test_pictures_are_spread_and_types_take_turns() -> None:
    kinds = ("yes/no", "yes/no", "yes/no", "color", "shape")
    dialogues = [
        asked(f"{n}", f"question {place}", kind) for n in range(18) for place, kind in enumerate(kinds)
    ]
    found = chosen(listed(dialogues))
    assert [each.pictures[0] for each in found] == [str(n) for n in range(0, 18, 3) for _ in range(3)]
    assert [each.kind for each in found[:3]] == ["yes/no", "color", "shape"]
    first = of_all_types(dialogues[:2])
    assert [each.question for each in first] == ["question 0", "question 1"]


def test_texts_without_a_picture_are_not_asked() -> None:
    text = Dialogue("text", (), (Turn(("say black.",), "black"),))
    caption = Dialogue("caption", ("1",), (Turn(("", ""), "a circle"),))
    assert chosen(listed([text, caption, asked("2", "what?", "")]))[0].pictures == ("2",)
    with pytest.raises(DataError, match=r"^the test split has no question about a picture: there is nothing"):
        chosen(listed([text, caption]))


def test_messages_are_read_back_as_the_dialogue() -> None:
    """What the endpoint makes of the request is the dialogue itself, earlier turns and system message with it."""
    turns = (Turn(("compare", "with", ""), "both red"), Turn(("", "and this?"), "blue"))
    dialogue = Dialogue("d", ("1", "2", "3"), turns, system="Answer briefly.")
    source = listed([dialogue])
    sent = messages(dialogue, source)
    assert [message["role"] for message in sent] == ["system", "user", "assistant", "user"]
    bodies = [Message.model_validate(message) for message in sent]
    read, images = read_conversation(bodies, ChatLimits(100, 16, 10**6))
    assert read.system == dialogue.system
    assert [turn.question for turn in read.turns] == [turn.question for turn in turns]
    assert read.turns[0].answer == "both red"
    assert [images[key].image for key in read.pictures] == [source.picture(key) for key in dialogue.pictures]


def test_a_wrong_answer_is_shown_with_the_right_one() -> None:
    turn = {"picture": "3", "question": "what color?", "right": ["red"], "milliseconds": 12.0}
    right, wrong = {**turn, "said": "red", "score": 1.0}, {**turn, "said": "", "score": 0.0}
    assert exchange(right) == "what color? → red"
    assert exchange(wrong) == "what color? → (nothing) (right: red)"
    (exhibit,) = dialogue_gallery([right, wrong], listed([])).exhibits
    assert (exhibit.title, exhibit.badge, exhibit.good) == ("3", "1 of 2 right", False)
    assert [(answer.right, answer.score) for answer in exhibit.answers] == [(True, 0.012), (False, 0.012)]
