"""A reward that is somebody's Python function."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor

from fmray.config.rewards import CallableReward
from fmray.errors import ConfigError
from fmray.rlhf.records import Rollouts
from fmray.rlhf.scoring import RewardRole, Verdict, texts_to_score, verdicts_of


class CallableScorer(RewardRole):
    """`score(texts, prompts)`, called with a request's samples; what it raises is those samples' failure.

    Where it raises for several samples it is asked again for each alone, so that the one it cannot score is known and the
    others have their scores: the function must say the same of a text whatever stands beside it.
    """

    def __init__(self, config: CallableReward) -> None:
        self._text = config.text
        self._function = find_function(config.function)

    def judge(self, rollouts: Rollouts) -> list[Verdict]:
        texts, prompts = texts_to_score(rollouts, self._text), list(rollouts.prompts)
        together = self._ask(texts, prompts)
        if together is not None:
            return together
        return [self._alone(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]

    def _ask(self, texts: list[str], prompts: list[str]) -> list[Verdict] | None:
        """None where it raises."""
        with _Kept() as kept:
            return verdicts_of(_plain(self._function(list(texts), list(prompts))), len(texts))
        assert kept.error is not None
        return None

    def _alone(self, text: str, prompt: str) -> Verdict:
        with _Kept() as kept:
            return verdicts_of(_plain(self._function([text], [prompt])), 1)[0]
        return f"the function raised {type(kept.error).__name__}: {' '.join(str(kept.error).split())}"


class _Kept:
    """`with _Kept() as kept:` round code that is not ours: an exception of any class, an interrupt not, is kept.

    A border like the HTTP handler's: the function may be a client of anything, with errors of its own that share no base.
    """

    error: BaseException | None = None

    def __enter__(self) -> _Kept:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, Exception)


def _plain(scores: Any) -> object:
    """Tensors and arrays as lists of numbers; the rest as it is."""
    if isinstance(scores, list | tuple):
        return [
            score.item() if isinstance(score, Tensor) and score.numel() == 1 else score for score in scores
        ]
    return scores.tolist() if hasattr(scores, "tolist") else scores


def find_function(path: str) -> Callable[[list[str], list[str]], object]:
    """The function behind `module:function`; ConfigError where there is none."""
    key = "rewards.*.function"
    name, _, function = path.partition(":")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        cure = "install it where the reward runs, or name its folder in PYTHONPATH"
        raise ConfigError(key, path, f"cannot be imported ({error}): {cure}") from None
    found = vars(module).get(function)
    if not callable(found):
        close = difflib.get_close_matches(function, [n for n, v in vars(module).items() if callable(v)], n=1)
        near = f"; did you mean {name}:{close[0]}?" if close else ""
        what = "is not a function" if function in vars(module) else f"{name} has no function {function}"
        raise ConfigError(key, path, what + near)
    return found  # type: ignore[no-any-return]
