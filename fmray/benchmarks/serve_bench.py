"""What the parts of `fmray benchmark serve` share: sizes, models and pictures on disk, the bodies of requests."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

from PIL import Image

from fmray.assets import fetch
from fmray.benchmarks.load import Load, Target, closed_loop
from fmray.benchmarks.serve_models import (
    benchmark_questions,
    write_clip,
    write_emoji_clip,
    write_llm,
    write_plain_emoji_clip,
    write_vqa,
)
from fmray.benchmarks.serve_processes import Server, cores
from fmray.config.schema import EmojiSource, ParquetSource
from fmray.data.dialogue_loader import group_dialogues
from fmray.data.dialogues import DialogueSource
from fmray.data.sources import open_source
from fmray.errors import ResourceError
from fmray.types import Dialogue


@dataclass(frozen=True, slots=True)
class ServeSizes:
    """How big everything is, and how often it is measured."""

    real: bool = True
    """ViT-B/32, the emoji CLIP, easy-VQA's model, SmolLM2; False: tiny ones on made-up pictures, no asset needed."""
    clients: int = 32
    pictures: int = 64
    """Different pictures of each kind, and questions, that are asked in turn."""
    repeats: int = 3
    clip_requests: int = 128
    """Pictures of a repeat through ViT-B/32."""
    emoji_requests: int = 1500
    answers: int = 320
    """Questions of a repeat to the VQA model, asked by all clients; one at a time a fourth of them."""
    llm_answers: int = 64
    singles: int = 60
    """Requests of a repeat, one at a time."""
    overload_seconds: float = 60.0
    overload: float = 3.0
    """Times the measured capacity."""
    recovery_seconds: float = 5.0
    ray_requests: int = 256


FULL = ServeSizes()
QUICK = ServeSizes(
    real=False, clients=8, pictures=8, repeats=1, clip_requests=32, emoji_requests=64, answers=48, llm_answers=16,
    singles=10, overload_seconds=8.0, ray_requests=64,
)  # fmt: skip


@dataclass
class ServeBench:
    """What the parts of one run share; models are written when a part asks for them."""

    folder: Path
    parity: Path
    sizes: ServeSizes
    given: dict[str, Path] = field(default_factory=dict)
    """Saved models that take the place of fresh ones: emoji, vqa, llm."""
    notes: list[str] = field(default_factory=list)
    peer: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = cores()
        self.server_core = None if found is None else found[0]
        self.load_core = None if found is None else found[1]

    # ------------------------------------------------------------------------------------------------------- models

    @cached_property
    def clip(self) -> Path:
        """A CLIPModel of transformers, ViT-B/32."""
        write_clip(self.folder / "clip", real=self.sizes.real)
        return self.folder / "clip"

    @cached_property
    def emoji(self) -> Path:
        """The small emoji CLIP."""
        if (given := self.given.get("emoji")) is not None:
            return given
        write_emoji_clip(self.folder / "emoji", real=self.sizes.real)
        return self.folder / "emoji"

    @cached_property
    def plain_emoji(self) -> Path:
        """What plain transformers makes of the small emoji CLIP; a given checkpoint, and a tiny one, are what they are."""
        if "emoji" in self.given or not self.sizes.real:
            return self.emoji
        write_plain_emoji_clip(self.folder / "plain_emoji")
        return self.folder / "plain_emoji"

    @cached_property
    def vqa(self) -> Path:
        """A VQA model."""
        if (given := self.given.get("vqa")) is not None:
            return given
        write_vqa(self.folder / "vqa", self.questions, self.folder / "scratch", real=self.sizes.real)
        return self.folder / "vqa"

    @cached_property
    def llm(self) -> Path:
        """A multimodal LLM."""
        if (given := self.given.get("llm")) is not None:
            return given
        write_llm(self.folder / "llm", self.folder / "scratch", real=self.sizes.real)
        return self.folder / "llm"

    @cached_property
    def names(self) -> dict[str, str]:
        """What the table calls them."""
        if not self.sizes.real:
            return dict.fromkeys(("clip", "emoji", "vqa", "llm"), "a tiny model")
        fresh = {
            "clip": "ViT-B/32",
            "emoji": "emoji CLIP (MobileNetV2 at 96 px)",
            "vqa": "VQA model (easy-vqa's size, untaught)",
            "llm": "multimodal LLM (SmolLM2-135M, untaught)",
        }
        return fresh | {name: f"{name} ({path.name})" for name, path in self.given.items()}

    # ----------------------------------------------------------------------------------------------------- pictures

    @cached_property
    def photos(self) -> Path:
        """A folder of JPEG photos, 348 pixels wide and high."""
        return self._write("photos", "jpg", self._photos() if self.sizes.real else made_up("JPEG"))

    @cached_property
    def drawings(self) -> Path:
        """A folder of emoji, PNG with transparency, 72 pixels wide and high."""
        return self._write("drawings", "png", self._drawings() if self.sizes.real else made_up("PNG"))

    def _photos(self) -> Iterator[bytes]:
        source = open_source(ParquetSource(path=str(fetch("groceries")), caption_column="fruit"), "test")
        step = max(1, len(source) // self.sizes.pictures)
        return (source[number].image for number in range(0, len(source), step))

    def _drawings(self) -> Iterator[bytes]:
        source = open_source(EmojiSource(), "test")
        return (source[number].image for number in range(len(source)))

    def _write(self, name: str, suffix: str, pictures: Iterator[bytes]) -> Path:
        folder = self.folder / name
        folder.mkdir()
        for number, data in enumerate(islice(pictures, self.sizes.pictures)):
            (folder / f"{number:04d}.{suffix}").write_bytes(data)
        return folder

    @cached_property
    def questions(self) -> DialogueSource:
        """Questions about pictures."""
        return benchmark_questions(real=self.sizes.real, pictures=max(self.sizes.pictures, 16))

    # ------------------------------------------------------------------------------------------------------- bodies

    def embedding_bodies(self, pictures: Path) -> list[bytes]:
        """Requests to `/v1/embeddings` as the openai client sends them (base64 vectors), a picture each."""
        common = {"model": "served", "encoding_format": "base64"}
        return [json.dumps(common | {"input": [url]}).encode() for url in data_urls(pictures)]

    def chat_bodies(self, max_tokens: int | None = None) -> list[bytes]:
        """Requests to `/v1/chat/completions`: questions of as many pictures as there are, one each."""
        groups = group_dialogues(self.questions, self.sizes.pictures)
        asked = [self.questions[group[number % len(group)]] for number, group in enumerate(groups)]
        return [self._chat_body(dialogue, max_tokens) for dialogue in asked]

    def _chat_body(self, dialogue: Dialogue, max_tokens: int | None) -> bytes:
        url = data_url(self.questions.picture(dialogue.pictures[0]))
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": dialogue.question},
        ]
        body: dict[str, object] = {
            "model": "served",
            "temperature": 0,
            "messages": [{"role": "user", "content": content}],
        }
        return json.dumps(body if max_tokens is None else body | {"max_tokens": max_tokens}).encode()

    # --------------------------------------------------------------------------------------------------------- load

    def closed(
        self,
        server: Server,
        path: str,
        bodies: list[bytes],
        requests: int,
        clients: int | None = None,
        *,
        keep: bool = False,
    ) -> Load:
        """A closed loop of this run's clients on a server that is warm; raises ResourceError where an answer is not 200."""
        load = closed_loop(
            Target(server.port, path),
            bodies,
            clients=clients or self.sizes.clients,
            requests=requests,
            keep=keep,
        )
        require_answers(server, load)
        return load


def require_answers(server: Server, load: Load) -> None:
    """Raises ResourceError where not every request was answered 200."""
    if load.answered != len(load.shots):
        raise ResourceError(f"{server.name} was asked what it must answer: {load.counted}")


def data_urls(folder: Path) -> list[str]:
    """The folder's pictures in order."""
    return [data_url(file.read_bytes()) for file in sorted(folder.iterdir())]


def data_url(data: bytes) -> str:
    """`data:image/jpeg;base64,…`"""
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def made_up(kind: str) -> Iterator[bytes]:
    """Pictures without end, each of its own colour."""
    number = 0
    while True:
        drawn = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
        drawn.paste((number * 37 % 256, number * 91 % 256, number * 53 % 256), (0, 0, 24, 20))
        buffer = io.BytesIO()
        drawn.save(buffer, kind)
        yield buffer.getvalue()
        number += 1
