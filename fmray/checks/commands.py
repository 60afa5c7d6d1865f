"""Commands that a manifest runs: `python -m jobs.x …` and `fmray x …` exist, and their keys are keys of that job."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmray.checks.findings import closest, did_you_mean
from fmray.checks.imports import Wrong, module_source, roots
from fmray.config.demo import DemoConfig
from fmray.config.demo_recipes import DEMO_RECIPES
from fmray.config.loading import HelpRequested, load_config, load_task
from fmray.config.recipes import SERVE_RECIPES
from fmray.config.reward import RewardModelConfig
from fmray.config.reward_recipes import REWARD_MODEL_RECIPES
from fmray.config.rlhf import RlhfConfig
from fmray.config.rlhf_recipes import RLHF_RECIPES
from fmray.config.serving import ServeConfig
from fmray.config.sweep import SweepConfig
from fmray.config.sweep_recipes import SWEEP_RECIPES
from fmray.config.tasks import EVALUATE_TASKS, PRETRAIN_TASKS
from fmray.errors import ConfigError

READERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "pretrain": lambda words: load_task(PRETRAIN_TASKS, words, door="fmray pretrain"),
    "evaluate": lambda words: load_task(EVALUATE_TASKS, words, door="fmray evaluate"),
    "reward": lambda words: load_config(RewardModelConfig, REWARD_MODEL_RECIPES, words, door="fmray reward"),
    "rlhf": lambda words: load_config(RlhfConfig, RLHF_RECIPES, words, door="fmray rlhf"),
    "sweep": lambda words: load_config(SweepConfig, SWEEP_RECIPES, words, door="fmray sweep"),
    "serve": lambda words: load_config(ServeConfig, SERVE_RECIPES, words, door="fmray serve"),
    "demo": lambda words: load_config(DemoConfig, DEMO_RECIPES, words, door="fmray demo"),
}
"""Jobs whose arguments are a configuration, and how each reads them."""

RUNNERS = ("python", "python3", "fmray")


def check_entrypoint(text: str, doors: Sequence[str]) -> Wrong | None:
    """What is wrong with a job's command; None: nothing, or it is not one of ours and cannot be known."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        return Wrong(f"is no shell command: {error}", "close the quotes")
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in ("exec", "env")):
        words.pop(0)
    if not words:
        return Wrong("is empty", "write a command, such as python -m jobs.pretrain")
    first, rest = words[0], words[1:]
    if first == "fmray":
        return _door(rest, doors)
    if re.fullmatch(r"(.*/)?python3?(\.\d+)?", first):
        return _python(rest, doors)
    near = closest(first, RUNNERS, 0.7)
    return Wrong(f"there is no command {first!r}", f"did you mean {near}?") if near else None


def _door(words: list[str], doors: Sequence[str]) -> Wrong | None:
    if not words or words[0] not in doors:
        name = words[0] if words else ""
        return Wrong(f"fmray has no door {name!r}", did_you_mean(name, list(doors)))
    return _arguments(words[0], words[1:])


def _python(words: list[str], doors: Sequence[str]) -> Wrong | None:
    while words and re.fullmatch(r"-[A-Zabdiqsuvx]+", words[0]):  # switches of Python's own, such as -u
        words = words[1:]
    if not words:
        return Wrong("runs no script", "write python -m jobs.NAME")
    if words[0] == "-m" and len(words) > 1:
        module = words[1]
        source = module_source(module)
        if isinstance(source, Wrong):
            return source
        if module == "fmray.cli":
            return _door(words[2:], doors)
        return _arguments(module.removeprefix("jobs."), words[2:]) if module.startswith("jobs.") else None
    if words[0].startswith("-"):
        return None
    script = Path(words[0])
    if not script.is_absolute() and not any((Path(root) / script).is_file() for root in roots()):
        folders = [Path(root) / script.parent for root in roots() if (Path(root) / script.parent).is_dir()]
        near = closest(script.name, {path.name for folder in folders for path in folder.glob("*.py")})
        cure = f"did you mean {script.parent / near}?" if near else "write a path below the working folder"
        return Wrong(f"there is no file {script}", cure)
    return _arguments(script.stem, words[1:]) if script.parent == Path("jobs") else None


def _arguments(job: str, words: list[str]) -> Wrong | None:
    """The keys of a job's command line, where all of them stand there: no file of the cluster's, no shell variable."""
    if job not in READERS or "$" in "".join(words) or any(word.startswith("--config") for word in words):
        return None
    try:
        READERS[job](words)
    except HelpRequested:
        return None
    except ConfigError as error:
        return Wrong(f"{job} does not take {error.key}={error.value!r}", error.cure)
    return None
