"""What both sides of `fmray benchmark vqa` work on: the questions, the configurations, tiny models where sizes are small."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fmray.config.answer_recipes import vqa_easy
from fmray.config.answers import AnswersConfig, LanguageModelConfig, MllmModelConfig, VqaModelConfig
from fmray.config.base import ReportConfig, RunConfig, RuntimeConfig
from fmray.config.schema import ImageConfig, TowerConfig
from fmray.data.dialogues import DialogueSource, ListedDialogues, asked, open_dialogues
from fmray.data.sources import Split
from fmray.models.language import save_language_model
from fmray.runtime.context import WorkerContext
from fmray.runtime.run_folder import RunFolder
from fmray.types import Dialogue

COLORS = ("red", "green", "blue", "gray")
SHAPES = ("circle", "square")
WORDS = "what color shape is the picture there a in it ? yes no " + " ".join((*COLORS, *SHAPES))


@dataclass(frozen=True, slots=True)
class VqaSizes:
    """How big everything is, and how often it is measured."""

    real: bool = True
    """easy-VQA and the recipe's towers; False: made-up pictures and tiny towers, no asset needed."""
    pictures: int = 512
    """Training pictures, on both sides."""
    batch: int = 48
    """Pictures of a step of ours."""
    questions: int = 6
    """Of each picture; the peer's batch is the product."""
    warm: int = 3
    """First steps of each measurement, which are not counted."""
    steps: int = 8
    """Counted steps of each measurement."""
    repeats: int = 5
    waiting: int = 32
    """Questions that wait for an answer, each about a picture of its own."""
    taught: int = 60
    """Steps that the VQA model learns before it answers, so that answers differ."""
    llm_tokens: int = 8
    """Longest answer of the multimodal LLM."""
    threads: int | None = None
    """None: as many as torch takes."""


FULL = VqaSizes()
QUICK = VqaSizes(
    real=False, pictures=12, batch=6, questions=3, warm=1, steps=2, repeats=2, waiting=6, taught=40, llm_tokens=4, threads=1,
)  # fmt: skip


@dataclass
class VqaBench:
    """What the parts of one run share."""

    folder: Path
    sizes: VqaSizes
    notes: list[str] = field(default_factory=list)
    peer: dict[str, str] = field(default_factory=dict)

    def make(self) -> None:
        """Write the tiny models, where sizes are small."""
        if not self.sizes.real:
            write_tiny_models(self.folder)

    @cached_property
    def train(self) -> DialogueSource:
        """The questions to learn from."""
        return self._open("train")

    @cached_property
    def test(self) -> DialogueSource:
        """The questions to answer."""
        return self._open("test")

    def _open(self, split: Split) -> DialogueSource:
        if self.sizes.real:
            return open_dialogues(vqa_easy().data.source, split)
        return made_up(split, max(self.sizes.pictures, self.sizes.waiting))

    def config(self, name: str, *, precision: str = "bf16", frozen: bool = False) -> AnswersConfig:
        """The recipe vqa_easy on this run's sizes; `frozen`: a locked MobileNetV2 at 128 pixels sees, and nothing else of it."""
        recipe, sizes = vqa_easy(), self.sizes
        assert isinstance(recipe.model, VqaModelConfig)
        model = recipe.model if sizes.real else tiny_vqa(recipe.model, self.folder)
        if frozen:
            side = 128 if sizes.real else 32
            model = model.replace(
                vision=self._convolutions(), freeze="encoders", image=ImageConfig(size=side)
            )
        return recipe.replace(
            run=RunConfig(name=name, storage=str(self.folder / "runs")),
            runtime=RuntimeConfig(threads=sizes.threads, device="cpu"),
            report=ReportConfig(progress=False),
            model=model,
            data=recipe.data.replace(
                batch_size=sizes.batch,
                questions_per_picture=sizes.questions,
                max_train_groups=sizes.pictures,
            ),
            optimizer=recipe.optimizer.replace(
                lr=recipe.optimizer.lr if sizes.real else 1e-2, schedule="constant", warmup_steps=0
            ),
            engine=recipe.engine.replace(precision=precision),
            train=recipe.train.replace(steps=100_000),
        )

    def llm_config(self) -> MllmModelConfig:
        """MobileNetV2 and SmolLM2-135M with a fresh projector; it has not learned to see, which costs no time."""
        tokens = self.sizes.llm_tokens
        if self.sizes.real:
            return MllmModelConfig(image=ImageConfig(size=128), max_tokens=128, max_answer_tokens=tokens)
        return MllmModelConfig(
            vision=self._convolutions(),
            language=LanguageModelConfig(source=str(self.folder / "language")),
            image=ImageConfig(size=32),
            template="plain",
            max_tokens=32,
            max_answer_tokens=tokens,
        )

    def _convolutions(self) -> TowerConfig:
        if self.sizes.real:
            return TowerConfig(source="asset:mobilenet_v2")
        small = {"image_size": 32, "depth_multiplier": 0.05, "min_depth": 8}
        return TowerConfig(source="arch:mobilenet_v2", pretrained=False, overrides=small)

    def context(self, config: AnswersConfig) -> WorkerContext:
        """One process, the CPU."""
        return WorkerContext(0, 1, torch.device("cpu"), RunFolder.of(config.run))


# ------------------------------------------------------------------------------------------------------------- small sizes


class _Plain:
    """Pictures of one colour with a pattern of their own; the key says which."""

    def read(self, key: str) -> bytes:
        number = int(key.partition("#")[2])
        noise = np.random.default_rng(number).integers(0, 64, (16, 16, 3), dtype=np.uint8)
        noise[..., number % 3] += 128 if number % len(COLORS) < 3 else 0
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        return buffer.getvalue()


def made_up(split: str, pictures: int) -> ListedDialogues:
    """Four questions about each of so many pictures."""
    dialogues: list[Dialogue] = []
    for number in range(pictures):
        color, shape = COLORS[number % len(COLORS)], SHAPES[number % len(SHAPES)]
        asks = {
            "what color is the picture ?": color,
            "what shape is in it ?": shape,
            "is there a circle ?": "yes" if shape == "circle" else "no",
            "is it red ?": "yes" if color == "red" else "no",
        }
        for question, answer in asks.items():
            dialogues.append(
                asked(f"{split}#{len(dialogues)}", f"{split}#{number}", question, answer, kind=question)
            )
    return ListedDialogues(tuple(dialogues), _Plain())


def tiny_vqa(model: VqaModelConfig, folder: Path) -> VqaModelConfig:
    """The recipe's model with every tower made tiny; the question's is read from `folder`."""
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    return model.replace(
        vision=model.vision.replace(
            overrides={**model.vision.overrides, **vision, "image_size": 16, "patch_size": 8}
        ),
        text=TowerConfig(source=str(folder / "text")),
        text_layer=-1,  # it has one
        decoder=model.decoder.replace(overrides={**model.decoder.overrides, **decoder}),
        image=ImageConfig(size=16, normalize="half"),
        max_question_tokens=16,
    )


def write_tiny_models(folder: Path) -> None:
    """A BERT that reads the questions and a Llama that could answer them, one layer and two."""
    torch.manual_seed(0)
    special = ["[PAD]", "[UNK]", "[END]"]
    vocabulary = {word: number for number, word in enumerate([*special, *dict.fromkeys(WORDS.split())])}
    size = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    bert = BertModel(BertConfig(num_hidden_layers=1, pad_token_id=0, **size), add_pooling_layer=False)
    ends = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **size, **ends))
    _save(bert, vocabulary, folder / "text")
    _save(llama, vocabulary, folder / "language")


def _save(model: PreTrainedModel, vocabulary: dict[str, int], folder: Path) -> None:
    tokenizer = Tokenizer(WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]", bos_token="[END]"
    )
    weights = {name: value.detach() for name, value in model.named_parameters()}
    save_language_model(model, weights, fast, folder)
