"""A tiny multimodal LLM that answers with pictures too, the tiny dual encoder it aims at, and requests for its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fmray.config.answers import OutputConfig
from fmray.models.mllm_answering import MllmAnswering
from fmray.models.mllm_output import Wanted, add_output
from fmray.types import Dialogue, Turn
from tests.endpoint import save_tiny_checkpoint
from tests.tiny_mllm import tiny_mllm

WIDTH = 8
"""D of the tiny dual encoder."""


def drawing(folder: Path, seed: int = 0, output: dict[str, Any] | None = None, **keys: Any) -> MllmAnswering:
    """`tiny_mllm` with an output side, in eval mode; its dual encoder is saved in a folder."""
    clip = folder / "clip"
    if not clip.exists():
        save_tiny_checkpoint(clip)
    plain = tiny_mllm(seed, **keys)
    add_output(plain.model, plain.tokenizer, OutputConfig(clip=str(clip), **{"hidden": 16, **(output or {})}))
    return MllmAnswering(plain.model.eval(), plain.tokenizer)


def request(caption: str, *, key: str = "", words: str = "", picture: str | None = None) -> Dialogue:
    """Draw a thing, or a picture's thing again; or with `words` say them about it."""
    question = (f"what is {caption}?" if words else f"draw {caption}",)
    turn = Turn(("", *question) if picture else question, words, picture="" if words else caption)
    pictures = (picture,) if picture else ()
    return Dialogue(f"{caption} {words}", pictures, (turn,), kind="words" if words else "picture", reply=key)


class Targets:
    """Unit vectors by caption and by key, drawn at random; `text == picture` with `alike`."""

    def __init__(self, alike: bool = False) -> None:
        self.alike, self.asked = alike, []

    def of(self, name: str) -> torch.Tensor:
        draw = torch.Generator().manual_seed(sum(map(ord, name)) * 31 + len(name))
        return torch.nn.functional.normalize(torch.randn(WIDTH, generator=draw), dim=0)

    def __call__(self, wanted: list[Wanted]) -> torch.Tensor:
        self.asked.append(list(wanted))
        rows = []
        for text, key in wanted:
            picture = self.of(text if self.alike else key) if key else torch.zeros(WIDTH)
            rows.append(torch.stack([self.of(text), picture]))
        return torch.stack(rows) if rows else torch.zeros(0, 2, WIDTH)
