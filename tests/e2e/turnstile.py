"""An engine that a test stops, lets go on, and breaks: what a real model cannot be told."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from fmray.serving.asks import Ask, ImageAsk, TextAsk
from fmray.serving.clip_engine import Embedding, EmbeddingCapabilities
from fmray.serving.engines import Prepared


class Turnstile:
    """Embeds everything as (1, 0), one item at a time. `held`: the model waits; a text `break`: it fails."""

    max_batch = 1
    capabilities = EmbeddingCapabilities(
        kind="clip",
        modalities=("text", "image"),
        output="embedding",
        max_tokens=77,
        image_size=1,
        dim=2,
        logit_scale=1.0,
        logit_bias=None,
    )

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.opened.set()
        self.working = threading.Event()
        self.seen: list[str] = []
        self.probe: Ask = TextAsk("probe", "probe")

    def warmup(self) -> None:
        """Nothing to warm."""

    def prepare(self, ask: Ask) -> Prepared[str]:
        text = f"{len(ask.image)} bytes" if isinstance(ask, ImageAsk) else ask.text
        return Prepared(text, "all", 1)

    def collate(self, items: Sequence[str]) -> list[str]:
        return list(items)

    def forward(self, batch: list[str]) -> list[Embedding]:
        self.seen += batch
        self.working.set()
        assert self.opened.wait(20), "nobody opened the turnstile"
        if "break" in batch:
            raise RuntimeError("CUDA error: device-side assert at 0x7f00 in /secret/path.py")
        return [Embedding(torch.tensor([1.0, 0.0]), 1, False) for _ in batch]
