"""The demo's VQA part: pictures and questions in, a model that answers trained and measured, an endpoint that a client asks."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmray.config.answers import AnswersConfig
from fmray.data.dialogues import DialogueSource, open_dialogues
from fmray.data.verdicts import spread
from fmray.errors import DataError
from fmray.evaluation.answers import Answered
from fmray.pipeline.demo_endpoint import client_of, endpoint
from fmray.pipeline.demo_stages import Stages, fetch_for, run_to_its_end
from fmray.runtime.run_folder import RunFolder
from fmray.training.answers import train_answers
from fmray.types import Dialogue, Turn

MODEL_ID = "fmray-vqa"
PICTURES = 6
"""Test pictures that the client asks about."""
QUESTIONS = 3
"""Questions about each of them, at most."""


@dataclass(frozen=True, slots=True)
class VqaPart:
    """What was found."""

    config: AnswersConfig
    conversation: list[dict[str, Any]]
    """Per question asked: the picture's key, the question, what was said, what is right, its score, milliseconds."""

    @property
    def folder(self) -> RunFolder:
        """The run's."""
        return RunFolder.of(self.config.run)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The run's evaluation.json."""
        found: dict[str, Any] = json.loads(self.folder.read_text("evaluation.json"))
        return found

    @property
    def source(self) -> DialogueSource:
        """The test split that was measured."""
        return open_dialogues(self.config.data.source, "test")

    @property
    def summary(self) -> dict[str, Any]:
        """Everything that the report draws, as numbers."""
        trained = [line for line in self.folder.metrics() if "train/loss" in line]
        evaluation = self.evaluation
        return {
            "results": evaluation["metrics"],
            "questions": evaluation["questions"],
            "kinds": evaluation["kinds"],
            "train": {
                "steps": trained[-1]["step"],
                "first_loss": trained[0]["train/loss"],
                "last_loss": trained[-1]["train/loss"],
                "step_seconds": sum(line["time/step"] for line in trained) / len(trained),
            },
            "endpoint": self.conversation,
        }


def run_vqa(config: AnswersConfig, stage: Stages) -> VqaPart:
    """Train and measure, serve, ask."""
    with stage("assets of VQA"):
        fetch_for(config)
    with stage("VQA training"):
        run_to_its_end("the VQA model", train_answers, config, config.train.steps)
    folder = Path(RunFolder.of(config.run).url)
    with stage("VQA endpoint"), endpoint(folder, config.runtime, MODEL_ID) as address:
        conversation = converse(open_dialogues(config.data.source, "test"), address)
    return VqaPart(config, conversation)


# ------------------------------------------------------------------------------------------------------ the conversation


def converse(source: DialogueSource, address: str) -> list[dict[str, Any]]:
    """Ask about some test pictures through the unmodified OpenAI client, each question in a request of its own.

    Raises DataError where a picture cannot be read, or there is none to ask about.
    """
    client = client_of(address)
    conversation = []
    for dialogue in chosen(source):
        asked: Any = messages(dialogue, source)
        started = time.perf_counter()
        reply = client.chat.completions.create(model=MODEL_ID, messages=asked)
        milliseconds = (time.perf_counter() - started) * 1000
        answered = Answered(dialogue, reply.choices[0].message.content or "")
        conversation.append(
            {
                "picture": dialogue.pictures[-1],
                "question": dialogue.question,
                "said": answered.said,
                "right": list(dict.fromkeys(answered.references)),
                "score": answered.score,
                "milliseconds": round(milliseconds, 1),
            }
        )
    return conversation


def chosen(source: DialogueSource) -> list[Dialogue]:
    """The questions: about pictures evenly spread over the split, each with some of its own, their types in turn."""
    groups: dict[tuple[str, ...], list[Dialogue]] = {}
    for index in range(len(source)):
        dialogue = source[index]
        if dialogue.pictures and dialogue.question:
            groups.setdefault(dialogue.pictures, []).append(dialogue)
    if not groups:
        raise DataError(
            "the test split has no question about a picture: there is nothing to ask the endpoint"
        )
    return [
        dialogue for group in spread(tuple(groups.values()), PICTURES) for dialogue in of_all_types(group)
    ]


def of_all_types(group: list[Dialogue]) -> list[Dialogue]:
    """A picture's questions, the first of each type before the second of any."""
    seen: dict[str, int] = {}
    rounds = []
    for place, dialogue in enumerate(group):
        rounds.append((seen.get(dialogue.kind, 0), place))
        seen[dialogue.kind] = seen.get(dialogue.kind, 0) + 1
    return [group[place] for _, place in sorted(rounds)[:QUESTIONS]]


def messages(dialogue: Dialogue, source: DialogueSource) -> list[dict[str, Any]]:
    """A dialogue up to its last question, as chat messages; pictures are `data:` URLs."""
    keys = iter(dialogue.pictures)
    found: list[dict[str, Any]] = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
    for place, turn in enumerate(dialogue.turns):
        if place:
            found.append({"role": "assistant", "content": dialogue.turns[place - 1].answer})
        found.append(
            {
                "role": "user",
                "content": parts(turn, [source.picture(next(keys)) for _ in range(turn.pictures)]),
            }
        )
    return found


def parts(turn: Turn, pictures: list[bytes]) -> list[dict[str, Any]]:
    """A question's texts with its pictures between them. The endpoint reads a picture's format from its bytes."""
    found: list[dict[str, Any]] = []
    for place, text in enumerate(turn.question):
        if place:
            url = "data:image/png;base64," + base64.b64encode(pictures[place - 1]).decode()
            found.append({"type": "image_url", "image_url": {"url": url}})
        if text:
            found.append({"type": "text", "text": text})
    return found
