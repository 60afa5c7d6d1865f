"""A real, tiny CLIP checkpoint on disk, a real server for it, and pictures to send."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fmray.config.serving import ServeConfig
from fmray.models.answering import Answering
from fmray.models.saved import save_dual_encoder
from fmray.runtime.ports import free_port
from fmray.serving.app import build_app
from fmray.serving.batcher import Batcher
from fmray.serving.chat_loop import ChatLoop
from fmray.serving.connections import uvicorn_settings
from fmray.serving.metrics import Meters
from fmray.serving.shelf import AnsweringModel, EmbeddingModel, Shelf
from fmray.serving.zero_shot import LabelVectors
from tests.tiny import tiny_model

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,!?"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, at most the 50 of `tiny_config`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def save_tiny_checkpoint(folder: Path, **options: object) -> str:
    model = tiny_model(**options).eval()
    save_dual_encoder(model, tiny_tokenizer(), folder)
    return str(folder)


def another_checkpoint(folder: Path) -> str:
    """One of the same shape that says other things."""
    model = tiny_model().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "projection" in name:
                weight.copy_(weight.flip(0))
    save_dual_encoder(model, tiny_tokenizer(), folder)
    return str(folder)


def save_answering(answering: Answering, folder: Path) -> str:
    """A VQA model or multimodal LLM as training saves it."""
    answering.save(answering.model.state_dict(), folder)
    return str(folder)


def picture(color: str = "red", size: tuple[int, int] = (20, 24), kind: str = "PNG", **save: object) -> bytes:
    """A picture with some structure, so that its size and orientation matter."""
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste(color, (0, 0, size[0] // 2, size[1] // 2))
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def app_of(engine: Any, model_id: str = "m", **config: Any) -> FastAPI:
    """The app of one engine that is there already."""
    settings, meters = ServeConfig(checkpoint="none", **config), Meters()
    batcher: Any = (Batcher if engine.capabilities.output == "embedding" else ChatLoop)(
        model_id, engine, settings.batch, meters
    )
    if isinstance(batcher, ChatLoop):
        model: Any = AnsweringModel(model_id, "none", engine, batcher)
    else:
        model = EmbeddingModel(model_id, "none", engine, batcher, LabelVectors(batcher.answer))
    return build_app(Shelf([model], meters), settings, meters)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app behind a real uvicorn in a thread; yields its address."""
    torch.set_num_threads(1)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", **uvicorn_settings()))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started, "uvicorn did not start"
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "uvicorn did not end"
