"""What training, evaluation and serving know of a model that answers about pictures: one protocol, two families.

B dialogues  N distinct pictures  P tokens of a picture  F width of the picture tower  V vocabulary
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fmray.config.answers import AnswerModelConfig, VqaModelConfig
from fmray.config.schema import ImageConfig
from fmray.errors import CheckpointError, DataError
from fmray.models.towers import locate_model
from fmray.types import Dialogue, Pictures

if TYPE_CHECKING:
    from fmray.models.decoding.running import Running


@dataclass
class AnswerOutput(ModelOutput):  # type: ignore[misc]  # transformers is untyped here
    """What a forward pass returns."""

    loss: Tensor | None = None
    """Cross-entropy, the mean over labelled tokens, and what answers of pictures add; float32 scalar; None without labels."""
    logits: Tensor | None = None
    """[B, T, V]; None where labels are given and only the loss was asked for."""
    past_key_values: object | None = None
    """The decoder's cache, when generating."""
    reply_loss: Tensor | None = None
    """What answers of pictures added to the loss; None where the model has words alone."""


@dataclass(frozen=True, slots=True)
class AnswerBatch:
    """Dialogues as the arguments of a model's forward pass, labels among them."""

    inputs: dict[str, Tensor]
    """Keyword arguments of `forward`, which returns an `AnswerOutput` with a loss."""
    tokens: int
    """Labelled tokens: what the loss is a mean over."""
    dialogues: int

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=moved)


@dataclass(frozen=True, slots=True)
class Said:
    """An answer. `Said("a red circle", tokens=4, prompt_tokens=61, ended=True)`"""

    text: str
    """Words alone: no special token, no space around them."""
    tokens: int
    """Tokens of the answer, its end among them."""
    prompt_tokens: int
    """Tokens that were read before it: a VQA model's question; a multimodal LLM's whole prompt, pictures among the words."""
    ended: bool
    """It ended by itself; False: it was cut at the longest answer."""
    embedding_D: Tensor | None = field(default=None, compare=False)
    """What a picture that answers should show: float32 [D], norm 1, of `output.clip`'s space; None: words are all there is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model reads and says. `Limits(prompt_tokens=512, answer_tokens=64, one_question=False, system=True)`"""

    prompt_tokens: int
    """Longest prompt, counted as `prompt_tokens` counts."""
    answer_tokens: int
    """Longest answer where nothing else is asked for, its end among them."""
    one_question: bool
    """It answers one question about one picture; False: dialogues with any number of pictures."""
    system: bool
    """It has a place for `Dialogue.system`."""


class Answering(Protocol):
    """A model with what turns dialogues into its tensors and its tokens into words."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def image(self) -> ImageConfig:
        """How a picture is prepared."""
        ...

    def picture_features(self, pixels_NCHW: Tensor) -> Tensor:
        """The picture tower's tokens, float [N, P, F], for `Pictures.features_NPF`; uint8 pixels in."""
        ...

    def collate(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> AnswerBatch:
        """A training batch; raises DataError with the dialogue's name: no answer token, a picture that is missing or too many."""
        ...

    @property
    def limits(self) -> Limits:
        """What it reads and says at most."""
        ...

    def prompt_tokens(self, dialogue: Dialogue) -> int:
        """Tokens before the last answer with nothing cut or left out, in any thread; raises DataError where none can be."""
        ...

    def answer_room(self, prompt_tokens: int) -> int:
        """Most tokens that an answer behind so many can have: what the language model has positions for."""
        ...

    def answer(
        self,
        dialogues: Sequence[Dialogue],
        pictures: Pictures,
        *,
        beams: int = 1,
        max_new_tokens: int | None = None,
    ) -> list[Said]:
        """What the model says to each dialogue's last turn (greedy, or the best of some beams), whose answer is not read.

        `max_new_tokens`: longest answer, its end among them; None: the model's own. Raises DataError with the dialogue's name
        where that is more than there is room for.
        """
        ...

    def running(self, max_rows: int, *, picture_memory_mib: float = 64.0) -> Running:
        """Answers of which each begins and ends when it will, at most so many at once, one token of each at a time.

        picture_memory_mib: what the picture tower made of the last pictures is kept up to that, by their keys.
        """
        ...

    def likelihood(self, dialogues: Sequence[Dialogue], pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Σ log-probability of each dialogue's last answer, end of text included, float32 [B], and its tokens, int64 [B]."""
        ...

    def hold_locked_parts(self) -> None:
        """Told once it is settled what learns: parts that do not are kept in evaluation mode, and remembered where that pays."""
        ...

    def plain_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights of this model under the names of one without adapters, which are added in."""
        ...

    def empty_copy(self) -> Answering:
        """The same family and configuration with weights that are still to be loaded, on the CPU, adapters not in it."""
        ...

    def save(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """One folder with everything: config.json, model.safetensors, tokenizers, preprocessor_config.json; rank 0 calls it."""
        ...


def check_room(name: str, max_new_tokens: int, room: int) -> None:
    """Raises DataError where an answer of so many tokens is none, or more than there is room for."""
    if not 1 <= max_new_tokens <= room:
        raise DataError(
            f"dialogue '{name}': max_new_tokens={max_new_tokens}, but its answer can have 1 to {room} tokens"
        )


def build_answering(config: AnswerModelConfig, dialogues: Sequence[Dialogue] = ()) -> Answering:
    """The model that a configuration asks for, in fp32 on the CPU. Raises ConfigError with the key.

    dialogues: the training data, read where a tokenizer is learned from them or a projection begins at their scale.
    """
    if isinstance(config, VqaModelConfig):
        from fmray.models.vqa_answering import build_vqa

        return build_vqa(config, dialogues)
    from fmray.models.mllm_answering import build_mllm

    return build_mllm(config)


def load_answering(location: str, device: torch.device) -> Answering:
    """A saved model of either family (a model, checkpoint or run folder), ready to answer; only safetensors are read.

    Raises CheckpointError in one line where there is none or it is another model's.
    """
    folder = locate_model(location, "checkpoint")
    config = Path(folder, "config.json")
    if not config.is_file():
        raise CheckpointError(f"{location}: holds no config.json")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind == "fmray_vqa":
        from fmray.models.vqa_answering import load_vqa

        return load_vqa(folder, device)
    if kind == "fmray_mllm":
        from fmray.models.mllm_answering import load_mllm

        return load_mllm(folder, device)
    raise CheckpointError(f"{location}: holds a {kind} model, which does not answer about pictures")
