"""Emoji pairs: concepts, the pinned split, captions."""

from __future__ import annotations

import pytest

from fmray.config.schema import EmojiSource, ImageConfig
from fmray.data.emoji import code_points, concept_of, from_code_points, held_out_concepts
from fmray.data.sources import Source, open_source
from fmray.data.transforms import decode_rgba
from fmray.errors import ConfigError


@pytest.mark.parametrize(
    ("emoji", "concept"),
    [
        ("🐶", "🐶"), ("👍🏿", "👍"), ("🏃🏿‍♀️", "🏃"), ("👩🏽‍🚒", "🧑‍🚒"), ("👨", "🧑"), ("👧", "🧒"),
        ("🤶🏻", "🧑‍🎄"), ("👨‍👩‍👧", "👪"),
        ("👩‍❤️‍💋‍👨", "💏"), ("🧑🏻‍❤️‍🧑🏿", "💑"), ("👬🏽", "🧑‍🤝‍🧑"),
        ("👩🏾‍🤝‍👨🏼", "🧑‍🤝‍🧑"), ("🫱🏻‍🫲🏿", "🤝"), ("❤️‍🔥", "❤‍🔥"),
        ("🏴‍☠️", "🏴‍☠"), ("🇰🇷", "🇰🇷"), ("🧔🏼‍♂️", "🧔"), ("🏿", ""),
    ],
)  # fmt: skip
def test_concept(emoji: str, concept: str) -> None:
    assert concept_of(emoji) == concept
    assert concept_of(concept) == concept


def test_code_points() -> None:
    assert code_points("🐶") == "U+1F436"
    assert code_points("#️⃣") == "U+0023-U+FE0F-U+20E3"
    assert from_code_points("U+1F436-U+200D") == "🐶\u200d"


def test_pinned_split_stays_as_it_was_drawn() -> None:
    concepts = held_out_concepts()
    assert (len(concepts), len(set(concepts))) == (330, 330)
    assert all(concept_of(concept) == concept for concept in concepts)
    assert [code_points(concept) for concept in concepts[:3]] == ["U+1F9D2", "U+1F4D1", "U+1F311"]


@pytest.mark.assets
def test_emoji_splits_share_no_concept_and_no_name() -> None:
    test = open_source(EmojiSource(), "test")
    train = open_source(EmojiSource(variants=True, aliases=False), "train")
    assert (len(test), len(train)) == (330, 5645)

    def concepts(source: Source) -> set[str]:
        names = (source.name(index).partition("/")[2] for index in range(len(source)))
        return {concept_of(from_code_points(name)) for name in names}

    assert (len(concepts(test)), len(concepts(train))) == (330, 1322)
    assert not concepts(test) & concepts(train)
    tested = {test[index].captions[0] for index in range(len(test))}
    assert len(tested) == 330
    assert not tested & {caption for index in range(len(train)) for caption in train[index].captions}


@pytest.mark.assets
def test_emoji_captions() -> None:
    test = open_source(EmojiSource(languages=("ko", "en"), vendors=("twemoji",)), "test")
    assert (test.name(0), test[0].captions) == (
        "noto/U+1F9D2",
        ("어린이", "child"),
    )  # Noto, whatever is trained on
    train = open_source(EmojiSource(languages=("en", "ko")), "train")
    assert len(train) == 2644
    captions = {train.name(index): train[index].captions for index in range(len(train))}
    assert captions["noto/U+1F436"] == ("dog face", "강아지 얼굴", "dog")
    assert captions["noto/U+1F44D"] == captions["twemoji/U+1F44D"]
    plain = open_source(EmojiSource(languages=("ko",)), "train")
    assert all(len(plain[index].captions) == 1 for index in range(len(plain)))  # aliases are English
    assert not any("_" in caption or ":" in caption for group in captions.values() for caption in group)


@pytest.mark.assets
def test_emoji_variants_are_named_without_their_tone() -> None:
    source = open_source(EmojiSource(variants=True, vendors=("noto",)), "train")
    found = {source.name(index): index for index in range(len(source))}
    runner = source[found["noto/U+1F3C3-U+1F3FF-U+200D-U+2640-U+FE0F"]]
    assert runner.captions[0] == "woman running"
    assert (
        decode_rgba(runner.image, ImageConfig(size=96), name=runner.name)[3].min() == 0
    )  # transparent around


@pytest.mark.assets
def test_every_language_names_every_test_concept() -> None:
    languages = ("en", "ko", "ja", "zh", "de", "fr", "es", "it", "pt")
    source = open_source(EmojiSource(languages=languages), "test")
    assert all(len(source[index].captions) == len(languages) for index in range(len(source)))


@pytest.mark.parametrize("key", ["languages", "vendors"])
def test_emoji_with_nothing_to_take(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.source\.{key}"):
        open_source(EmojiSource.model_validate({key: ()}), "train")
