"""A whole training of a model that answers with pictures, tiny: what it learns from, what is measured, what is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fmray.config.answers import AnswersConfig
from fmray.config.dialogues import RequestSource
from fmray.config.loading import dump_json, validate
from fmray.data.dialogue_loader import DialogueDataset, DialogueLoader
from fmray.data.dialogues import open_dialogues
from fmray.data.sources import open_source
from fmray.data.transforms import decode_rgba
from fmray.evaluation.embed import embed_pictures, embed_texts
from fmray.models.answering import load_answering
from fmray.models.mllm_answering import MllmAnswering
from fmray.models.saved import load_dual_encoder
from fmray.pipeline.answers_report import write_answers_report
from fmray.runtime.metrics import METRICS
from fmray.runtime.run_folder import RunFolder
from fmray.training.answers import Watch, learn, make_learner, train_answers
from fmray.training.replies import ReplyEmbeddings
from fmray.training.unreadable import Unreadable
from fmray.types import Metrics
from tests.endpoint import save_tiny_checkpoint
from tests.tiny_mllm import tiny_mllm
from tests.unit.data.test_dialogues_requests import shapes
from tests.unit.evaluation.contexts import context

CPU = torch.device("cpu")


def configured(folder: Path, steps: int = 2) -> AnswersConfig:
    plain = tiny_mllm(loud=False)
    plain.save(plain.model.state_dict(), folder / "words")
    save_tiny_checkpoint(folder / "clip")
    model = {
        **{"kind": "mllm", "checkpoint": str(folder / "words"), "max_tokens": 128, "max_answer_tokens": 6},
        **{"output": {"clip": str(folder / "clip"), "hidden": 16}, "lora": {"rank": 4}, "row_tokens": 256},
    }
    keys = {
        "run": {"name": "run", "storage": str(folder)},
        "data": {
            "source": shapes(folder),
            "batch_size": 4,
            "micro_batch_size": 2,
            "questions_per_picture": 1,
        },
        "model": model,
        "parts": {"vision": {"train": "none"}, "output": {"lr": 1e-3}},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": steps},
        "evaluate": {"batch_size": 8},
    }
    return validate(AnswersConfig, keys)


def test_targets_are_the_dual_encoders_own_embeddings(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "clip")
    encoder = load_dual_encoder(str(tmp_path / "clip"), CPU)
    source = RequestSource.model_validate(shapes(tmp_path))
    targets = ReplyEmbeddings(encoder, open_dialogues(source, "train"))
    wanted = [("red circle", "train/0"), ("a haunted house", ""), ("blue bar", "train/1")]
    first = targets(wanted)
    pairs = open_source(source.pairs, "train")
    rgba = torch.stack([decode_rgba(pairs[i].image, encoder.image, name="x") for i in (0, 1)])
    with torch.no_grad():
        words, pictures = embed_texts(encoder, [text for text, _ in wanted]), embed_pictures(encoder, rgba)
    assert torch.allclose(first[:, 0], words, atol=1e-6)
    assert torch.allclose(first[[0, 2], 1], pictures, atol=1e-6)
    assert first[1, 1].abs().sum() == 0
    # remembered to the bit, whatever stands beside it: equal captions are told by equal vectors
    assert torch.equal(targets([("blue bar", "train/1"), ("x", "")])[0], first[2])
    assert targets([]).shape == (0, 2, 8)


def test_the_replies_share_of_the_loss_is_reported(tmp_path: Path) -> None:
    config, where = configured(tmp_path), context()
    source = open_dialogues(config.data.source, "train")
    learner = make_learner(config, source, where)
    dataset = DialogueDataset(source, config.data, learner.answering.image, 0, decode=False)
    ((step, loaded),) = DialogueLoader(dataset, 0, 1).batches(0, 1)
    batches = learner.batches(loaded, config, where)
    learned = learn(learner, batches, config, where, step)
    metrics = Watch(Unreadable(1.0)).metrics(learned, loaded, where)
    with torch.no_grad():
        parts = [learner.model(**b.inputs, loss_only=True).reply_loss.item() * b.tokens for b in batches]
    assert metrics["train/reply_loss"] == pytest.approx(sum(parts) / learned.tokens, rel=1e-4)
    assert 0 < metrics["train/reply_loss"] < metrics["train/loss"]
    assert "train/reply_loss" not in Watch(Unreadable(1.0)).metrics(
        replace(learned, replies=0.0), loaded, where
    )
    assert metrics.keys() <= METRICS.keys()


def test_a_training_from_requests_to_a_page(tmp_path: Path) -> None:
    config = configured(tmp_path)
    home = RunFolder.of(config.run)
    where = context(folder=home.url)
    home.write_text(dump_json(config), "config.json")
    assert train_answers(config, where).finished
    evaluation = json.loads(home.read_text("evaluation.json"))
    metrics = evaluation["metrics"]
    assert evaluation["questions"] == 8
    assert {row["kind"] for row in evaluation["replies"]["kinds"]} >= {"picture", "again", "look"}
    for kind in ("picture", "again"):
        assert metrics[f"eval/replies/{kind}/chance/r1"] == 1 / 2
        assert metrics[f"eval/replies/{kind}/r5"] in (0.0, 1.0)
        assert 1 <= metrics[f"eval/replies/{kind}/mean_rank"] <= 2
    assert 0 <= metrics["eval/routing"] <= 1
    saved = load_answering(home.url, CPU)
    assert isinstance(saved, MllmAnswering)
    assert saved.model.output is not None
    page = Path(write_answers_report(home)).read_text(encoding="utf-8")
    assert "What came back" in page
    assert "Decisions by kind of request" in page


def test_its_loss_falls(tmp_path: Path) -> None:
    config, losses = configured(tmp_path, steps=60), []

    def tell(step: int, metrics: Metrics) -> None:
        losses.extend([metrics["train/loss"]] if "train/loss" in metrics else [])

    where = replace(context(folder=RunFolder.of(config.run).url), reporters=[tell])
    assert train_answers(config, where).finished
    assert losses[-1] < 0.9 * losses[0]
