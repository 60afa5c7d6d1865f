"""Where prompts come from and how long they may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from fmray.config.base import Section
from fmray.config.dialogues import DialogueSourceConfig, EasyVqaSource
from fmray.errors import ConfigError


class ReviewPromptSource(Section):
    """The first words of movie reviews, broken off inside their first sentence (a pinned asset, no hub needed)."""

    kind: Literal["reviews"] = "reviews"
    source: Literal["imdb", "rotten_tomatoes", "both"] = "both"
    """Whose reviews: IMDB's are written prose, Rotten Tomatoes' single sentences in lower case."""
    words: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (4, 8)
    """`[min, max]` words of a prompt; each review's number is drawn by a hash of its text."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.words[0] > self.words[1]:
            raise ConfigError("prompts.source.words", list(self.words), "write [min, max] with min <= max")
        return self


class JsonlPromptSource(Section):
    """Lines of `{"prompt": "…"}` in `<path>/<split>.jsonl`."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """Folder with `train.jsonl` and `test.jsonl`."""
    text_key: str = "prompt"
    """Key of the prompt."""


class HubPromptSource(Section):
    """A dataset of the Hugging Face hub or a local `datasets` folder."""

    kind: Literal["hub"] = "hub"
    path: str
    """Hub id or local folder, as for `datasets.load_dataset`."""
    config_name: str | None = None
    """The dataset's configuration, where it has several."""
    column: str = "prompt"
    """Column with the prompt."""
    train_split: str = "train"
    """Split to train on; slices (`train[:90%]`) work."""
    test_split: str = "test"
    """Split to evaluate on."""


class QuestionPromptSource(Section):
    """Questions about pictures, one picture each, for a policy that sees: a multimodal LLM."""

    kind: Literal["questions"] = "questions"
    dialogues: DialogueSourceConfig = EasyVqaSource()
    """Where they are; `prompts.source.dialogues.kind` selects their type."""


def prompt_kind(value: Any) -> str:
    """The `kind` of a source of prompts given as keys or as a section; reviews where it is not said."""
    return str(value.get("kind", "reviews") if isinstance(value, dict) else getattr(value, "kind", ""))


PromptSourceConfig = Annotated[
    Annotated[ReviewPromptSource, Tag("reviews")]
    | Annotated[JsonlPromptSource, Tag("jsonl")]
    | Annotated[HubPromptSource, Tag("hub")]
    | Annotated[QuestionPromptSource, Tag("questions")],
    Discriminator(prompt_kind),
]

PROMPT_KINDS = ("reviews", "jsonl", "hub", "questions")


class PromptConfig(Section):
    """What the policy is asked."""

    source: PromptSourceConfig = ReviewPromptSource()
    """The prompts; `prompts.source.kind` selects their type."""
    template: str = "{}"
    """Text around each prompt, which goes where {} stands; questions about pictures wear the model's own template."""
    max_tokens: Annotated[int, Field(ge=1)] = 64
    """Longer prompts are cut at the end of a line, a sentence or a word; the template's end stays. Questions about pictures have
    the limit that their model was saved with."""
    max_prompts: Annotated[int, Field(ge=1)] | None = None
    """Take only this many of each split, from its beginning."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.template.count("{}") != 1:
            raise ConfigError("prompts.template", self.template, "write {} once, where the prompt goes")
        if isinstance(self.source, QuestionPromptSource) and self.template != "{}":
            cure = "questions about pictures wear the model's own template: leave it at {}"
            raise ConfigError("prompts.template", self.template, cure)
        return self
