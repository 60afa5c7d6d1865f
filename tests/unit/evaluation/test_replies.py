"""Requests through a model that answers from a table: decisions, places of the right picture, every number by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fmray.config.answers import AnswerEvaluateConfig
from fmray.config.schema import ImageConfig
from fmray.data.dialogues import ListedDialogues
from fmray.errors import DataError
from fmray.evaluation.embed import embed_texts
from fmray.evaluation.replies import embed_keys, evaluate_replies
from fmray.models.answering import Said
from fmray.models.saved import LoadedDualEncoder, load_dual_encoder
from fmray.types import Dialogue, Metrics, Pictures, Turn
from tests.endpoint import save_tiny_checkpoint
from tests.unit.evaluation.contexts import context
from tests.workers import run_workers

NAMES = ("cat", "dog", "tree", "moon", "car", "boat")


class Drawings:
    """A picture of its own for each key; one may be damaged."""

    def read(self, key: str) -> bytes:
        if key == "broken":
            return b"no picture"
        draw, stream = torch.Generator().manual_seed(int(key)), io.BytesIO()
        Image.fromarray(torch.randint(0, 256, (16, 16, 3), generator=draw).byte().numpy()).save(stream, "PNG")
        return stream.getvalue()


class Table:
    """Answers by the dialogue's name: words, or a vector."""

    image = ImageConfig(size=16)

    def __init__(self, said: dict[str, str | torch.Tensor]) -> None:
        self.said, self.model = said, nn.Linear(1, 1)

    def answer(self, dialogues: Sequence[Dialogue], pictures: Pictures, *, beams: int = 1) -> list[Said]:
        answers = []
        for dialogue in dialogues:
            assert set(dialogue.pictures) <= set(pictures.keys)
            given = self.said[dialogue.name]
            words = given if isinstance(given, str) else ""
            answers.append(Said(words, 1, 5, True, None if isinstance(given, str) else given))
        return answers


def split() -> ListedDialogues:
    """For each name a request for its picture, and one for words; the first picture is asked for by itself too."""
    wanted = [
        Dialogue(f"{i} picture", (), (Turn((f"draw {n}",), "", picture=n),), kind="picture", reply=str(i))
        for i, n in enumerate(NAMES)
    ]
    told = [Dialogue(f"{i} name", (), (Turn((f"name {n}",), n),), kind="name") for i, n in enumerate(NAMES)]
    again = Dialogue("again", ("0",), (Turn(("", "again"), "", picture="cat"),), kind="again", reply="0")
    return ListedDialogues((*wanted, *told, again), Drawings())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LoadedDualEncoder:
    folder = tmp_path_factory.mktemp("clip")
    return load_dual_encoder(save_tiny_checkpoint(folder), torch.device("cpu"))


def answers(encoder: LoadedDualEncoder) -> dict[str, str | torch.Tensor]:
    """Pictures 0 to 3 found, 4 asked for as another, 5 answered with words; of the names one drawn and one wrong."""
    embeds = embed_keys(encoder, split(), [str(i) for i in range(6)])
    said: dict[str, str | torch.Tensor] = {f"{i} picture": embeds[i] for i in range(4)}
    said |= {"4 picture": -embeds[4], "5 picture": "a boat", "again": embeds[0]}
    return said | {f"{i} name": n for i, n in enumerate(NAMES)} | {"1 name": embeds[1], "2 name": "moon"}


def measured(encoder: LoadedDualEncoder, **keys: Any) -> tuple[Metrics, dict[str, Any]]:
    model, config = Table(answers(encoder)), AnswerEvaluateConfig(batch_size=4, **keys)
    return evaluate_replies(model, encoder, split(), config, context())  # type: ignore[arg-type]


def test_every_number_by_hand(encoder: LoadedDualEncoder) -> None:
    metrics, details = measured(encoder)
    assert metrics["eval/routing"] == 11 / 13
    assert metrics["eval/routing/picture"] == 5 / 6
    assert metrics["eval/routing/name"] == 5 / 6
    assert metrics["eval/routing/again"] == 1
    assert metrics["eval/exact_match"] == 4 / 6
    embeds = embed_keys(encoder, split(), [str(i) for i in range(6)])
    against = embeds @ -embeds[4]
    place = int((against > against[4]).sum())  # from 0; the one answered with words is last, the fifth
    ranks = [0, 0, 0, 0, place, 5]
    for k in (1, 5):
        assert metrics[f"eval/replies/picture/r{k}"] == sum(rank < k for rank in ranks) / 6
        assert metrics[f"eval/replies/picture/chance/r{k}"] == k / 6
    assert metrics["eval/replies/picture/chance/r10"] == 1
    assert metrics["eval/replies/picture/mean_rank"] == pytest.approx(1 + sum(ranks) / 6)
    with torch.no_grad():
        scores = embed_texts(encoder, list(NAMES)) @ embeds.T
    first = sum(int(scores[i].argmax()) == i for i in range(6))
    assert metrics["eval/replies/picture/ceiling/r1"] == pytest.approx(first / 6)
    assert metrics["eval/replies/again/r1"] == 1
    rows = {row["kind"]: row for row in details["replies"]["kinds"]}
    assert rows["picture"]["pictures"] == 5
    assert rows["picture"]["words"] == 1
    assert rows["name"] == {
        **{"kind": "name", "requests": 6, "wants": "words", "pictures": 1, "words": 5},
        "exact_match": 4 / 6,
    }
    shown = {row["name"]: row for row in details["replies"]["gallery"]}
    assert shown["2 picture"]["returned"][0][0] == "2"
    assert shown["2 picture"]["returned"][0][2] == "tree"
    assert shown["2 picture"]["rank"] == 0
    assert shown["5 picture"]["returned"] == []
    assert not shown["5 picture"]["routed"]


def test_the_pictures_to_find_are_those_of_the_whole_split(encoder: LoadedDualEncoder) -> None:
    metrics, details = measured(encoder, max_samples=3)
    assert details["questions"] == 3
    assert details["replies"]["pictures"] == 6
    assert metrics["eval/replies/picture/chance/r1"] == 1 / 6


def test_a_split_without_pictures_is_refused(encoder: LoadedDualEncoder) -> None:
    told = ListedDialogues((Dialogue("a", (), (Turn(("name it",), "cat"),)),), Drawings())
    with pytest.raises(DataError) as error:
        evaluate_replies(Table({}), encoder, told, AnswerEvaluateConfig(), context())  # type: ignore[arg-type]
    assert str(error.value) == (
        "the test split has no request that a picture answers: there is nothing to evaluate on"
    )


def _on_rank(rank: int, world_size: int, folder: str) -> tuple[Metrics, dict[str, Any]]:
    encoder = load_dual_encoder(folder, torch.device("cpu"))
    model, config = Table(answers(encoder)), AnswerEvaluateConfig(batch_size=4)
    return evaluate_replies(model, encoder, split(), config, context(rank, world_size))  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_ranks_measure_the_same(tmp_path: Path, encoder: LoadedDualEncoder) -> None:
    folder = save_tiny_checkpoint(tmp_path)
    one = _on_rank(0, 1, folder)
    assert run_workers(2, _on_rank, folder) == [one, one]
