"""A reward behind HTTP."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from fmray.config.rewards import HttpReward
from fmray.errors import ConfigError
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scoring import RewardRole, Verdict, texts_to_score, verdicts_of

MAX_ANSWER_BYTES = 1 << 20
"""Longest answer that is read; scores take about twenty bytes each."""
PAUSES = (0.5, 8.0)
"""Seconds before the second try, and the longest: each pause is twice the one before."""

_log = logging.getLogger(__name__)


class HttpScorer(RewardRole):
    """POST {"texts": […], "prompts": […]} to one address; the answer is {"scores": […]}, a number for each text.

    No answer in time, a broken one, 408, 429 and 5xx are asked again, with growing pauses; anything else is final: other
    statuses, redirects (they would take the text and its headers elsewhere), an answer that is not such JSON.
    """

    def __init__(self, config: HttpReward) -> None:
        if urlsplit(config.url).scheme.lower() not in ("http", "https") or not urlsplit(config.url).hostname:
            raise ConfigError("rewards.*.url", config.url, "must be http:// or https:// and a host")
        self._config = config
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._headers |= {name: header_value(name, value) for name, value in config.headers.items()}
        self._opener = urllib.request.build_opener(_NoRedirects)

    def judge(self, rollouts: Rollouts) -> list[Verdict]:
        texts, size = texts_to_score(rollouts, self._config.text), self._config.batch_size
        verdicts: list[Verdict] = []
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            verdicts += self._ask(part, list(rollouts.prompts[start : start + size]))
        return verdicts

    def _ask(self, texts: list[str], prompts: list[str]) -> list[Verdict]:
        body = json.dumps({"texts": texts, "prompts": prompts}).encode()
        pause, why = PAUSES[0], ""
        for tried in range(1, self._config.tries + 1):
            try:
                answer = self._post(body)
            except _Refused as error:
                return [f"{self._config.url} {error}"] * len(texts)
            except (OSError, http.client.HTTPException) as error:
                why = f"{self._config.url} {_reason(error, self._config.request_timeout_seconds)}"
            else:
                return self._scores(answer, len(texts))
            _log.info("%s (try %d of %d)", why, tried, self._config.tries)
            if tried < self._config.tries:
                time.sleep(pause)
                pause = min(2 * pause, PAUSES[1])
        return [f"{why} ({self._config.tries} tries)"] * len(texts)

    def _post(self, body: bytes) -> bytes:
        """The answer's body. OSError or HTTPException: worth another try; _Refused: not."""
        limit = self._config.request_timeout_seconds
        deadline = time.monotonic() + limit
        request = urllib.request.Request(self._config.url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=limit) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            error.close()
            if 300 <= error.code < 400:
                raise _Refused(
                    f"redirects to {error.headers.get('Location')}: write that address, if it is right"
                ) from None
            if error.code < 500 and error.code not in (408, 429):
                raise _Refused(f"answers {error.code} {error.reason}") from None
            raise

    def _scores(self, answer: bytes, count: int) -> list[Verdict]:
        try:
            content = json.loads(answer)
        except ValueError:
            return [f"{self._config.url} answers no JSON: {answer[:80]!r}"] * count
        if not isinstance(content, Mapping) or "scores" not in content:
            return [f"{self._config.url} answers JSON without 'scores': {answer[:80]!r}"] * count
        verdicts = verdicts_of(content["scores"], count)
        return [f"{self._config.url}: {v}" if isinstance(v, str) else v for v in verdicts]


class _Refused(Exception):
    """An answer that another try would not change."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect becomes an HTTPError."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read(response: Any, deadline: float) -> bytes:
    """The body, however slowly it drips, by the deadline and up to MAX_ANSWER_BYTES."""
    parts: list[bytes] = []
    size = 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > MAX_ANSWER_BYTES:
            raise _Refused(f"answers more than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise http.client.IncompleteRead(b"".join(parts), response.length)
    return b"".join(parts)


def _reason(error: OSError | http.client.HTTPException, limit: float) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"answers {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"did not answer within {limit:g} s"
    return f"cannot be asked: {type(cause).__name__} {cause}".rstrip()


def header_value(name: str, text: str) -> str:
    """`Bearer $TOKEN` with environment variables in their places; ConfigError where one is not set or cannot be sent."""
    key = f"rewards.*.headers.{name}"

    def variable(match: re.Match[str]) -> str:
        if match.group(1) not in os.environ:
            cure = f"the environment variable {match.group(1)} is not set where the reward runs"
            raise ConfigError(key, text, cure)
        return os.environ[match.group(1)]

    value = re.sub(r"\$([A-Za-z_][A-Za-z0-9_]*)", variable, text)
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name) or not (
        value.isascii() and value.isprintable()
    ):
        raise ConfigError(key, text, "is no HTTP header: name and value must be printable ASCII in one line")
    return value
