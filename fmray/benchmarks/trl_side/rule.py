"""The cheap reward of the speed comparison; both sides call this function. Imports nothing."""

from __future__ import annotations


def vowel_share(texts: list[str], prompts: list[str]) -> list[float]:
    """The share of characters that are vowels, in [0, 1]; an empty text has none."""
    return [sum(character in "aeiou" for character in text) / max(1, len(text)) for text in texts]
