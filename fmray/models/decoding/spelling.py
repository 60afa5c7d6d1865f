"""From tokens to text as they come: pieces that are whole letters, and the bytes that one token stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerFast

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no letter, or not yet."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""A byte among SentencePiece's tokens."""


class Pieces:
    """An answer's text as it grows. The pieces joined are the text without the space around it.

    Space and the beginning of a letter wait for what follows. Only the tokens since the last piece are decoded again, with some
    before them: what a token's text is may depend on whether one stands before it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._told, self._context = 0, 0
        self._waiting, self._begun = "", False

    def add(self, token: int) -> str:
        """The text that this token brings to an end; often it is empty, or more than the token's own."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._told])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(before) or text.endswith(UNFINISHED):
            return ""
        self._context, self._told = self._told, len(self._ids)
        return self._ready(text[len(before) :])

    def end(self) -> str:
        """What still waited: the text ends here, space before the end is no part of it."""
        before = self._decode(self._ids[self._context : self._told])
        text = self._decode(self._ids[self._context :])
        self._context = self._told = len(self._ids)
        return self._ready(text[len(before) :])

    def _ready(self, text: str) -> str:
        text = self._waiting + text
        if not self._begun:
            text = text.lstrip()
        ready = text.rstrip()
        self._begun = self._begun or bool(ready)
        self._waiting = text[len(ready) :]
        return ready


class Spelling:
    """The bytes of single tokens; in a row they are the text's, where the tokenizer spells bytes (GPT-2's and its like do)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        spells_bytes = "ByteLevel(" in repr(tokenizer.backend_tokenizer.decoder)
        self._bytes = _byte_of() if spells_bytes else {}
        self._known: dict[int, bytes] = {}

    def octets(self, token: int) -> bytes:
        """What the token stands for within a text; nothing for an id that the tokenizer does not have."""
        if token not in self._known:
            self._known[token] = self._spelled(token)
        return self._known[token]

    def _spelled(self, token: int) -> bytes:
        backend = self._tokenizer.backend_tokenizer
        word = backend.id_to_token(token)
        if word is None:
            return b""
        if token in backend.get_added_tokens_decoder():
            return str(word).encode()
        if self._bytes:
            return bytes(self._bytes[letter] for letter in word if letter in self._bytes)
        found = BYTE.fullmatch(word)
        return bytes([int(found.group(1), 16)]) if found else str(word).replace("\u2581", " ").encode()


def _byte_of() -> dict[str, int]:
    """GPT-2's letters for bytes (Radford et al. 2019, `encoder.py`): printable ones are themselves, others come from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
