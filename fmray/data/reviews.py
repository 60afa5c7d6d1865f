"""Movie reviews with their sentiment, from the pinned asset, in splits that no text crosses.

IMDB (Maas et al. 2011) and Rotten Tomatoes (Pang and Lee 2005), the public training parts of both; the test split here is held
out of those. Nearly all of SST-2's dev set is among them: it is no held-out set for what is trained here.
"""

from __future__ import annotations

import hashlib
import html
import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import pyarrow.parquet as pq

from fmray.assets import fetch
from fmray.data.sources import Split

ReviewSource = Literal["imdb", "rotten_tomatoes"]

TEST_SHARE: dict[ReviewSource, float] = {"imdb": 0.04, "rotten_tomatoes": 0.12}
"""About 1,000 of each. Never change it, nor `OPENING_WORDS` or `folded`: results are compared on the test split."""
OPENING_WORDS = 12
"""Reviews that open with the same words are in the same split: some were posted twice with another ending."""

_BREAK = re.compile(r"\s*(?:<br\s*/?>\s*)+", re.IGNORECASE)
_TAG = re.compile(r"</?(?:i|b|u|p|em|hr)\s*/?>", re.IGNORECASE)
_CONTROLS = {
    **dict.fromkeys([*range(0x09), *range(0x0E, 0x20), 0x7F]),  # deleted
    **{code: bytes([code]).decode("cp1252", errors="ignore") for code in range(0x80, 0xA0)},
}
"""Control characters; those above 127 are Windows' dashes, quotes and ellipses, decoded as Latin-1."""


@dataclass(frozen=True, slots=True)
class Review:
    """`Review("Funny from start to end.", label=True, source="imdb")`."""

    text: str
    """As a reader sees it: line ends for `<br />`, entities decoded."""
    label: bool
    """True: positive."""
    source: ReviewSource


def load_reviews(
    split: Split, source: Literal["imdb", "rotten_tomatoes", "both"] = "both"
) -> tuple[Review, ...]:
    """The reviews of a split in the asset's order, each text once. Raises AssetError.

    Train: 23,902 of IMDB and 7,512 of Rotten Tomatoes; test: 999 and 1,016.
    """
    return tuple(review for review in _splits()[split] if source in ("both", review.source))


def folded(text: str) -> str:
    """A text's words without case, punctuation and spacing: what makes two reviews equal."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def text_hash(text: str) -> int:
    """64 bits of a text, the same in every process (Python's own hash is salted)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def plain(text: str) -> str:
    """A review's HTML as text."""
    text = html.unescape(_TAG.sub("", _BREAK.sub("\n", text))).translate(_CONTROLS)
    return "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()


@cache
def _splits() -> dict[Split, tuple[Review, ...]]:
    rows = pq.read_table(fetch("movie_reviews") / "reviews.parquet").to_pylist()
    first: dict[str, Review] = {}
    for row in rows:
        review = Review(plain(row["text"]), row["label"], row["source"])
        first.setdefault(folded(review.text), review)
    splits: dict[Split, list[Review]] = {"train": [], "test": []}
    for words, review in first.items():
        opening = " ".join(words.split(" ", OPENING_WORDS)[:OPENING_WORDS])
        held_out = text_hash(opening) < TEST_SHARE[review.source] * 2**64
        splits["test" if held_out else "train"].append(review)
    return {split: tuple(reviews) for split, reviews in splits.items()}
