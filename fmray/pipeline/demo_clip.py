"""The demo's first part: real pictures in, a CLIP model trained and measured, an endpoint that a stock client asks."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmray.assets import fetch
from fmray.config.schema import DataConfig, EmojiSource, EvaluateConfig, ParquetSource, PretrainConfig
from fmray.data.sources import open_source
from fmray.models.saved import load_dual_encoder
from fmray.pipeline.demo_endpoint import client_of, endpoint
from fmray.pipeline.demo_stages import Stages, run_to_its_end
from fmray.pipeline.exhibits import exhibits
from fmray.pipeline.sections import Gallery, Matrix
from fmray.runtime.context import WorkerContext, choose_device, prepare_process
from fmray.runtime.run_folder import RunFolder
from fmray.training.loop import pretrain

ASSETS = ("emoji_images", "emoji_names", "minilm", "mobilenet_v2", "groceries")
MODEL_ID = "fmray-clip"
QUESTIONS = 6
"""Test pictures that the client asks about."""


@dataclass(frozen=True, slots=True)
class ClipPart:
    """What was found."""

    config: PretrainConfig
    galleries: list[Gallery | Matrix]
    conversation: list[dict[str, Any]]
    """Per picture asked: name, its five likeliest names with scores, milliseconds."""

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics.jsonl."""
        return RunFolder.of(self.config.run).metrics()

    @property
    def summary(self) -> dict[str, Any]:
        """Everything that the report draws, as numbers."""
        reports = self.reports
        trained = [line for line in reports if "train/loss" in line]
        measured = {k: v for line in reports for k, v in line.items() if k.startswith("eval/")}
        return {
            "results": measured,
            "train": {
                "steps": trained[-1]["step"],
                "first_loss": trained[0]["train/loss"],
                "last_loss": trained[-1]["train/loss"],
                "step_seconds": sum(line["time/step"] for line in trained) / len(trained),
            },
            "endpoint": self.conversation,
        }


def run_clip(config: PretrainConfig, stage: Stages) -> ClipPart:
    """Train, look, serve, ask."""
    folder = Path(RunFolder.of(config.run).url)
    with stage("assets of CLIP"):
        for name in ASSETS:
            fetch(name)
    with stage("training"):
        run_to_its_end("CLIP", pretrain, config, config.train.steps)
    with stage("evaluation"):
        galleries = look(config)
    with stage("endpoint"), endpoint(folder, config.runtime, MODEL_ID) as address:
        conversation = ask(config, address)
    return ClipPart(config, galleries, conversation)


def look(config: PretrainConfig) -> list[Gallery | Matrix]:
    """Galleries of the test emoji, and what the model makes of photos, which it has never seen."""
    prepare_process(config.runtime)
    device = choose_device(config.runtime.device)
    folder = RunFolder.of(config.run)
    here = WorkerContext(rank=0, world_size=1, device=device, folder=folder)
    encoder = load_dual_encoder(folder.url, device)
    sections = exhibits(encoder, config.data, config.evaluate, here)
    photos = DataConfig(source=ParquetSource(path=str(fetch("groceries")), caption_column="fruit"))
    templates = EvaluateConfig(templates=("{}", "a picture of a {}"))
    return [*sections, *(s for s in exhibits(encoder, photos, templates, here) if isinstance(s, Matrix))]


def ask(config: PretrainConfig, address: str) -> list[dict[str, Any]]:
    """Name test pictures through the unmodified OpenAI client: embeddings of pictures and of all names, nearest first."""
    source = config.data.source
    plain = source.replace(aliases=False, languages=("en",)) if isinstance(source, EmojiSource) else source
    test = open_source(plain, "test")
    samples = [test[index] for index in range(min(len(test), 100))]
    names = list(dict.fromkeys(sample.captions[0] for sample in samples))
    client = client_of(address)
    vectors = [row.embedding for row in client.embeddings.create(model=MODEL_ID, input=names).data]
    conversation = []
    for sample in samples[:QUESTIONS]:
        url = "data:image/png;base64," + base64.b64encode(sample.image).decode()
        started = time.perf_counter()
        picture = client.embeddings.create(model=MODEL_ID, input=[url]).data[0].embedding
        milliseconds = (time.perf_counter() - started) * 1000
        scores = [sum(a * b for a, b in zip(picture, vector, strict=True)) for vector in vectors]
        best = sorted(range(len(names)), key=lambda i: -scores[i])[:5]
        answers = [{"name": names[i], "cosine": round(scores[i], 3)} for i in best]
        conversation.append(
            {"picture": sample.captions[0], "answers": answers, "milliseconds": round(milliseconds, 1)}
        )
    return conversation
