"""Measures of answers beside lmms-eval 0.7.3's own functions, in an environment of its own that is made once under `.parity`.

lmms-eval asks for some sixty packages; the functions compared here need two. It is installed without the others, and its
packages' `__init__` files, which import all tasks and models, are passed over: its files run as they are, but for
`lmms_eval.api.registry`, of which `metrics.py` uses two decorators.
"""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fmray.benchmarks.peers import PeerEnvironment, environment
from fmray.evaluation.vqa_accuracy import CONTRACTIONS, anls, normalise_answer, relaxed, vqa_accuracy

PARITY = Path(__file__).parent.parent.parent / ".parity"
LMMS_EVAL = PeerEnvironment(
    "lmms-eval-0.7.3", (("--no-deps", "lmms-eval==0.7.3"), ("loguru", "numpy>=2,<3", "sacrebleu==2.6.0"))
)
pytestmark = [pytest.mark.slow, pytest.mark.parity, pytest.mark.timeout(600)]

PEER = """
import json, sys, types
from importlib.util import find_spec
from pathlib import Path

root = Path(find_spec("lmms_eval").origin).parent
for name in ("", ".api", ".tasks", ".tasks._task_utils", ".tasks.vqav2", ".tasks.chartqa"):
    package = types.ModuleType("lmms_eval" + name)
    package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    sys.modules[package.__name__] = package
registry = types.ModuleType("lmms_eval.api.registry")
registry.register_metric = registry.register_aggregation = lambda *names, **options: lambda function: function
sys.modules[registry.__name__] = registry

from lmms_eval.api.metrics import anls
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from lmms_eval.tasks.vqav2.utils import vqav2_process_results

processor = EvalAIAnswerProcessor()
asked = json.load(sys.stdin)

def accuracy(said, answers):
    people = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)]
    return vqav2_process_results({"answers": people, "question_id": 0}, [said])["exact_match"]

def processed(text):
    return processor.process_digit_article(processor.process_punctuation(text))

print(json.dumps({
    "contractions": EvalAIAnswerProcessor.CONTRACTIONS,
    "processed": [processed(text) for text in asked["texts"]],
    "accuracy": [accuracy(said, answers) for said, answers in asked["people"]],
    "anls": [anls(answers, [said])["anls"] for said, answers in asked["people"] if " ".join(said.split()) == said],
    "relaxed": [[relaxed_correctness(said, answer) for answer in answers] for said, answers in asked["numbers"]],
}))
"""

PIECES = r"""
a the an none zero two ten eleven red Blue YES dog's couldntve yall'd've dont shouldn'tve somebody'd
1,000 2,5 1,,2 3.5 4. a.m. 12:30 left/right (red) red-ish @home it's? no! x_y 50% $5 \ ' . , - ; ...
"""


def drawn_text(draw: random.Random) -> str:
    """Words and marks as people and models write them, and some that nobody would."""
    text = draw.choice(["", " "]).join(draw.choices(PIECES.split(), k=draw.randint(1, 3)))
    return text if draw.random() < 0.8 else text + "".join(draw.choices("ab1 .,'-?/", k=5))


def plain(text: str) -> str:
    """Without runs of spaces, whose length lmms-eval's ANLS counts on one side only."""
    return " ".join(text.split())


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    """Texts; what was said to ten people's answers, mostly some of them; numbers."""
    draw = random.Random(0)
    people = []
    for _ in range(2000):
        pool = [plain(drawn_text(draw)) for _ in range(draw.randint(1, 4))]
        people.append((draw.choice([draw.choice(pool), plain(drawn_text(draw))]), draw.choices(pool, k=10)))
    values = [
        "0",
        "0.0",
        "1",
        "1.05",
        "1.0501",
        "-1",
        "-1.04",
        "105%",
        "1e2",
        "104.9",
        "red",
        "Red",
        "1,000",
        "1000",
    ]
    numbers = [(said, values) for said in values]
    return {"texts": [drawn_text(draw).strip() for _ in range(5000)], "people": people, "numbers": numbers}


@pytest.fixture(scope="module")
def found(asked: dict[str, Any]) -> dict[str, Any]:
    """What lmms-eval makes of it."""
    command = [str(LMMS_EVAL.python(PARITY)), "-c", PEER]
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=False, env=environment(1)
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_the_processing_of_answers_is_lmms_evals(asked: dict[str, Any], found: dict[str, Any]) -> None:
    assert [normalise_answer(text, "normalise_always") for text in asked["texts"]] == found["processed"]
    theirs = {word: whole for word, whole in found["contractions"].items() if word != whole}
    assert {word: whole for word, whole in theirs.items() if word == word.lower()} == CONTRACTIONS


def test_vqa_accuracy_is_lmms_evals(asked: dict[str, Any], found: dict[str, Any]) -> None:
    ours = [vqa_accuracy(said, answers, "normalise_always") for said, answers in asked["people"]]
    assert ours == pytest.approx(found["accuracy"], abs=1e-12)
    assert len({round(accuracy, 1) for accuracy in ours}) == 5  # 0, .3, .6, .9 and 1 were all met
    official = [vqa_accuracy(said, answers) for said, answers in asked["people"]]
    for (_, answers), one, other in zip(asked["people"], official, ours, strict=True):
        assert one == other or len(set(answers)) == 1 or any(",," in text for text in answers)


def test_anls_and_relaxed_match_are_lmms_evals(asked: dict[str, Any], found: dict[str, Any]) -> None:
    assert [anls(said, answers) for said, answers in asked["people"]] == pytest.approx(
        found["anls"], abs=1e-12
    )
    ours = [[relaxed(said, [answer]) for answer in answers] for said, answers in asked["numbers"]]
    assert ours == found["relaxed"]
