"""Questions about made-up pictures and a tiny multimodal LLM in a folder, so that whole PPO runs that see need no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fmray.config.rlhf import RlhfConfig
from fmray.models.mllm_answering import MllmAnswering
from fmray.types import Dialogue, Pictures, Turn
from tests.stories import story_run
from tests.tiny_mllm import tiny_mllm

COLORS = {"red": (220, 30, 40), "blue": (30, 60, 220), "two": (40, 200, 60)}
"""What a picture's colour is called; "two" is green: a word that the tiny tokenizer has learned from other answers."""
QUESTION = "what color is it?"


def tiny_seer(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A multimodal LLM as `MllmAnswering.save` leaves it; a convolutional tower's fresh weights would forget the picture."""
    answering = tiny_mllm(seed, **changes)
    with torch.no_grad():
        for weight in answering.model.vision.parameters():
            if weight.dim() == 4:
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
    return saved(answering, folder)


def saved(answering: MllmAnswering, folder: Path) -> Path:
    weights = {name: value.detach() for name, value in answering.model.named_parameters()}
    weights |= dict(answering.model.named_buffers())
    answering.save(weights, folder)
    return folder


def colored(number: int, color: str, size: int = 16) -> torch.Tensor:
    """A noisy picture of one colour, uint8 [3, S, S]; another one for each number."""
    noise = np.random.default_rng(number).integers(-25, 26, (size, size, 3))
    return torch.from_numpy((np.array(COLORS[color]) + noise).clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def write_quiz(folder: Path, train: int = 24, test: int = 24, colors: Sequence[str] = tuple(COLORS)) -> Path:
    """Pictures of one colour and the question which, in LLaVA's format: `train.json`, `test.json` and `pictures/`."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "test": test}
    for split, count in counts.items():
        entries = []
        for place in range(count):
            number, color = place + (split == "test") * train, colors[place % len(colors)]
            pixels_HWC = colored(number, color).permute(1, 2, 0).numpy()
            Image.fromarray(pixels_HWC).save(folder / "pictures" / f"{number}.png")
            said = [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": color},
            ]
            entries.append({"id": str(number), "image": f"{number}.png", "conversations": said})
        (folder / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def quiz_run(folder: Path, policy: Path, **changes: Any) -> RlhfConfig:
    """`story_run` with questions about pictures, rewarded by the right answer and by a cheap rule."""
    quiz = write_quiz(folder / "quiz")
    files = {"train_file": str(quiz / "train.json"), "test_file": str(quiz / "test.json")}
    dialogues = {"kind": "llava", **files, "images": str(quiz / "pictures")}
    keys: dict[str, Any] = {
        "prompts.source": {"kind": "questions", "dialogues": dialogues},
        "rewards": {
            "answer": {"kind": "answer", "metric": "anls"},
            "letters": {"kind": "python", "function": "tests.stories:letter_share", "pool": {"replicas": 0}},
        },
        **changes,
    }
    return story_run(folder, policy, **keys)


def a_guesser(folder: Path, colors: Sequence[str], steps: int = 60) -> Path:
    """A seer that was taught to say one of these words, whatever it sees: the picture's own no more often than another.

    In 60 steps it learns the words, and nothing of the pictures that would help to choose among them.
    """
    answering = tiny_mllm(loud=False)
    count = 24
    pixels = torch.stack([colored(1000 + n, colors[n % len(colors)]) for n in range(count)])
    pictures = Pictures(tuple(map(str, range(count))), pixels)
    # every picture with every word, so that no word goes with a picture
    dialogues = [
        Dialogue(f"{n}/{word}", (str(n),), (Turn(("", f"\n{QUESTION}"), word),))
        for n in range(count)
        for word in colors
    ]
    batch = answering.collate(dialogues, pictures)
    answering.model.vision.requires_grad_(False)
    learning = [p for p in answering.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=5e-3, weight_decay=0.0)
    for _ in range(steps):
        answering.model(**batch.inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return saved(answering, folder)
