"""Where questions about pictures come from, and how they are cut into batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fmray.config.base import Section
from fmray.config.data import AugmentConfig, EmojiSource, SourceConfig


class EasyVqaSource(Section):
    """Synthetic shapes with 13 answers (easy-vqa, MIT; a pinned asset, no hub needed)."""

    kind: Literal["easy_vqa"] = "easy_vqa"


class VqaV2Source(Section):
    """The official layout: questions and annotations as json, ten answers to a question, pictures by number."""

    kind: Literal["vqa_v2"] = "vqa_v2"
    train_questions: str
    """`v2_OpenEnded_mscoco_train2014_questions.json`."""
    train_annotations: str
    """`v2_mscoco_train2014_annotations.json`."""
    test_questions: str
    """The questions to measure on (the official validation split: its answers are public)."""
    test_annotations: str
    """Their annotations."""
    train_images: str
    """Folder of the training pictures."""
    test_images: str
    """Folder of the pictures to measure on."""
    file_name: str = "COCO_{split}2014_{image_id:012d}.jpg"
    """A picture's file; {split} is train or val, {image_id} its number."""
    consensus: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Train only on questions whose most frequent answer was given by at least this share of people; 0: on all."""


class HubVqaSource(Section):
    """A dataset of the Hugging Face hub or a local `datasets` folder with a picture, a question and answers in a row."""

    kind: Literal["hub_vqa"] = "hub_vqa"
    path: str
    """Hub id or local folder, as for `datasets.load_dataset`."""
    config_name: str | None = None
    """The dataset's configuration, where it has several."""
    image_column: str = "image"
    """Column with the picture."""
    question_column: str = "question"
    """Column with the question."""
    answer_column: str = "answers"
    """Column with an answer, a list of answers, or a list of {answer: …}."""
    kind_column: str | None = None
    """Column with the type of question, for results by type."""
    train_split: str = "train"
    """Split to train on; slices (`train[:90%]`) work."""
    test_split: str = "validation"
    """Split to measure on."""


class LlavaSource(Section):
    """Instructions in LLaVA's json: `[{id, image, conversations: [{from: human|gpt, value}]}]`, `<image>` marks the picture."""

    kind: Literal["llava"] = "llava"
    train_file: str
    """The json file to train on."""
    test_file: str
    """The json file to measure on."""
    images: str
    """Folder that the entries' `image` is relative to."""


class CaptionSource(Section):
    """Pictures with their captions, from any source of image-text pairs: the answer is the caption."""

    kind: Literal["captions"] = "captions"
    pairs: SourceConfig = EmojiSource()
    """The pairs; `data.source.pairs.kind` selects their type."""
    prompts: tuple[str, ...] = ("",)
    """What is asked; one is drawn for each caption. An empty one is no question at all: picture, then caption."""


class LabelSource(Section):
    """Questions made by templates from the labels of pictures (they are templated, and say so in their type)."""

    kind: Literal["labels"] = "labels"
    pairs: SourceConfig
    """Labelled pictures: a source of pairs whose first caption is the label (of kind `folder` with `template={}`)."""
    what: tuple[str, ...] = ("what is in the picture?", "what is this?")
    """Questions that the label answers."""
    whether: tuple[str, ...] = ("is this {}?", "does the picture show {}?")
    """Questions of yes and no; {} is the right label half of the time, else another."""


class RequestSource(Section):
    """Requests for a picture, and ones about the same things that words answer; made by templates from image-text pairs.

    Templates of the test split are not those of training, and no caption of the test split is asked for in training.
    """

    kind: Literal["requests"] = "requests"
    pairs: SourceConfig = EmojiSource()
    """Pictures to ask for, by their captions."""
    languages: tuple[Literal["ko", "ja", "zh", "de", "fr", "es", "it", "pt"], ...] = ("ko", "de", "fr")
    """Languages that names are asked for in (emoji only; other pairs have names in one language)."""
    words: Annotated[int, Field(ge=0)] = 0
    """So many frequent noun phrases of the movie reviews are asked for in training too: requests whose picture nobody has."""


def dialogue_kind(value: Any) -> str:
    """The `kind` of a source of dialogues given as keys or as a section; easy_vqa where it is not said."""
    return str(value.get("kind", "easy_vqa") if isinstance(value, dict) else getattr(value, "kind", ""))


DialogueSourceConfig = Annotated[
    Annotated[EasyVqaSource, Tag("easy_vqa")]
    | Annotated[VqaV2Source, Tag("vqa_v2")]
    | Annotated[HubVqaSource, Tag("hub_vqa")]
    | Annotated[LlavaSource, Tag("llava")]
    | Annotated[CaptionSource, Tag("captions")]
    | Annotated[LabelSource, Tag("labels")]
    | Annotated[RequestSource, Tag("requests")],
    Discriminator(dialogue_kind),
]

DIALOGUE_KINDS = ("easy_vqa", "vqa_v2", "hub_vqa", "llava", "captions", "labels", "requests")


class DialogueDataConfig(Section):
    """What is read, how it is cut into batches. A batch is so many pictures, each with what is asked of it."""

    source: DialogueSourceConfig = EasyVqaSource()
    """The data set; `data.source.kind` selects its type."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Groups per optimizer step over all workers: a picture (or a set of them) with its questions, or a text without one."""
    questions_per_picture: Annotated[int, Field(ge=1)] | None = None
    """At most so many of a group's dialogues in one step, drawn anew each epoch, types in turn; None: all."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Groups in a worker's memory at once; None: its whole share. It changes no result."""
    decode_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and decode for each learner; 0: in the learner's own."""
    cache_decoded: Annotated[int, Field(ge=0)] = 512
    """MiB of decoded pictures that each process keeps in memory; 0: decode each time."""
    cache_features: bool = True
    """Keep a locked picture tower's outputs on the disk, by model and picture, so that it runs once per picture."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of the training pictures; one that a question speaks of left or right in is never mirrored."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Unreadable pictures are skipped and counted; more than this share of those read stops the run, by name."""
    max_train_groups: Annotated[int, Field(ge=1)] | None = None
    """Only this many groups of the training split, evenly spread; None: all."""
