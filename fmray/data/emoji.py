"""Emoji pictures with their names, split by concept: an emoji without skin tone and gender.

"Woman running, dark skin" is a variant of the concept "person running", so that no variant of a test concept
is ever trained on. The test concepts are pinned in `emoji_split.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fmray.assets import fetch
from fmray.config.schema import EmojiSource
from fmray.data.sources import Split, read_picture
from fmray.errors import ConfigError
from fmray.types import ImageText

VENDOR_FOLDERS = {"noto": "Goog", "twemoji": "Twtr"}
TEST_VENDOR = "noto"
"""Test pictures are Noto's whatever is trained on, so that results stay comparable."""

JOINER, VARIATION = "\u200d", "\ufe0f"
SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
GENDER_SIGNS = ("♀", "♂")
ADULTS = ("👨", "👩")
PEOPLE = ("👨", "👩", "👦", "👧", "🧑", "🧒")
NEUTRAL = {
    **{"👨": "🧑", "👩": "🧑", "👦": "🧒", "👧": "🧒", "👴": "🧓", "👵": "🧓"},
    **{"🤴": "🫅", "👸": "🫅", "🕺": "💃", "🎅": "🧑‍🎄", "🤶": "🧑‍🎄", "🤰": "🫄", "🫃": "🫄"},
    **{"👫": "🧑‍🤝‍🧑", "👬": "🧑‍🤝‍🧑", "👭": "🧑‍🤝‍🧑", "🚹": "🚻", "🚺": "🚻", "♂": "⚧", "♀": "⚧"},
    "🫱\u200d🫲": "🤝",  # a handshake of two skin tones
}
"""Emoji that carry a gender (or a tone) of their own, and the one that does not."""


def without_tone(emoji: str) -> str:
    """An emoji without skin tones and variation selectors; empty for a bare tone swatch."""
    return "".join(sign for sign in emoji if sign != VARIATION and sign not in SKIN_TONES)


def concept_of(emoji: str) -> str:
    """The emoji that stands for all variants: `concept_of("🏃🏿‍♀️") == "🏃"`. Empty for a bare tone swatch."""
    plain = without_tone(emoji)
    if plain in NEUTRAL:
        return NEUTRAL[plain]
    parts = plain.split(JOINER)
    if len(parts) == 1:
        return plain
    if parts[-1] in GENDER_SIGNS:  # woman running
        return concept_of(JOINER.join(parts[:-1]))
    people = sum(part in PEOPLE for part in parts)
    if people == len(parts):
        return "👪"
    if people > 1:
        return "💏" if "💋" in parts else "💑" if "❤" in parts else "🧑‍🤝‍🧑"
    return JOINER.join("🧑" if part in ADULTS else part for part in parts)  # man farmer


def code_points(emoji: str) -> str:
    """`code_points("🐶") == "U+1F436"`, as the picture files are named."""
    return "-".join(f"U+{ord(sign):04X}" for sign in emoji)


def from_code_points(text: str) -> str:
    """The inverse of `code_points`."""
    return "".join(chr(int(point.removeprefix("U+"), 16)) for point in text.split("-"))


def held_out_concepts() -> tuple[str, ...]:
    """The pinned test concepts, in an order that mixes topics (the first n are a fair sample)."""
    pinned = json.loads(Path(__file__).with_name("emoji_split.json").read_text(encoding="utf-8"))
    return tuple(map(from_code_points, pinned["test"]))


@dataclass(frozen=True, slots=True)
class EmojiPictures:
    """Pictures of the asset and their captions.

    `EmojiPictures(root, (("noto/U+1F436", ("dog face", "dog")), …))`
    """

    root: Path
    samples: tuple[tuple[str, tuple[str, ...]], ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ImageText:
        name, captions = self.samples[index]
        vendor, _, file = name.partition("/")
        path = self.root / VENDOR_FOLDERS[vendor] / f"{file}.png"
        return ImageText(name, read_picture(path, name), captions)

    def name(self, index: int) -> str:
        return self.samples[index][0]


def open_emoji(config: EmojiSource, split: Split) -> EmojiPictures:
    """Train: the pictures of all other concepts. Test: one Noto picture for each test concept.

    Captions are the names in the configured languages, in their order; for training without repetitions, and
    with the English aliases after them. Samples are called `<vendor>/<code points>`, such as `noto/U+1F436`.
    Raises AssetError, ConfigError.
    """
    for key, value in (("languages", config.languages), ("vendors", config.vendors)):
        if not value:
            raise ConfigError(f"data.source.{key}", value, "give at least one")
    root = fetch("emoji_images")
    names = EmojiNames(fetch("emoji_names"), config.languages)
    if split == "test":
        files = {emoji: file for file, emoji in _pictures(root, TEST_VENDOR)}
        return EmojiPictures(root, tuple((files[c], names.names(c)) for c in held_out_concepts()))
    held_out = frozenset(held_out_concepts())
    samples = []
    for vendor in config.vendors:
        for file, emoji in _pictures(root, vendor):
            concept = concept_of(emoji)
            if concept and concept not in held_out and (config.variants or emoji == concept):
                aliases = names.aliases(emoji) if config.aliases else ()
                samples.append((file, _each_once(names.names(emoji) + aliases)))
    return EmojiPictures(root, tuple(samples))


def _pictures(root: Path, vendor: str) -> Iterator[tuple[str, str]]:
    """Every picture of a vendor as (sample name, emoji without variation selectors), sorted."""
    for path in sorted((root / VENDOR_FOLDERS[vendor]).glob("*.png")):
        yield f"{vendor}/{path.stem}", from_code_points(path.stem).replace(VARIATION, "")


class EmojiNames:
    """Names of emoji in some languages, and their English aliases."""

    def __init__(self, folder: Path, languages: Sequence[str]) -> None:
        english = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
        tables = {
            language: json.loads((folder / f"emoji_{language}.json").read_text(encoding="utf-8"))
            for language in languages
            if language != "en"
        }
        self._names: dict[str, tuple[str, ...]] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        for emoji, row in sorted(
            english.items(), key=lambda item: int(item[1]["status"])
        ):  # fully qualified first
            key = emoji.replace(VARIATION, "")
            names = [
                row["en"] if language == "en" else tables[language].get(emoji, "") for language in languages
            ]
            if key not in self._names and all(names):
                self._names[key] = tuple(map(_as_words, names))
                self._aliases[key] = tuple(map(_as_words, row.get("alias", ()))) if "en" in languages else ()

    def names(self, emoji: str) -> tuple[str, ...]:
        """An emoji's name in each language, without its skin tone."""
        return self._names[self._key(emoji)]

    def aliases(self, emoji: str) -> tuple[str, ...]:
        """Its English aliases; none where English is not among the languages."""
        return self._aliases[self._key(emoji)]

    def _key(self, emoji: str) -> str:
        plain = without_tone(emoji)
        return (
            plain if plain in self._names else concept_of(emoji)
        )  # couples of two tones have no name of their own


def _each_once(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Without repetitions that differ at most in case; the first spelling stays."""
    first: dict[str, str] = {}
    for caption in captions:
        first.setdefault(caption.casefold(), caption)
    return tuple(first.values())


def _as_words(name: str) -> str:
    """`_as_words(":person_running:") == "person running"`."""
    return name.strip(":").replace("_", " ").replace("’", "'")
