"""What README and runbook say is true: their commands parse, its map names what is there, its figures' places exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from fmray.checks.files import check_files, read_order
from fmray.cli import DOORS
from fmray.config.demo import DemoConfig
from fmray.config.demo_recipes import DEMO_RECIPES
from fmray.config.index import IndexConfig
from fmray.config.loading import load_config, load_task
from fmray.config.recipes import SERVE_RECIPES
from fmray.config.reward import RewardModelConfig
from fmray.config.reward_recipes import REWARD_MODEL_RECIPES
from fmray.config.rlhf import RlhfConfig
from fmray.config.rlhf_recipes import RLHF_RECIPES
from fmray.config.serving import ServeConfig
from fmray.config.sweep import SweepConfig
from fmray.config.sweep_recipes import SWEEP_RECIPES
from fmray.config.tasks import EVALUATE_TASKS, PRETRAIN_TASKS
from fmray.serving.keys import run_keys

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNBOOK = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")

PARSERS: dict[str, Callable[[list[str]], object]] = {
    "pretrain": lambda words: load_task(PRETRAIN_TASKS, words, door="pretrain"),
    "reward": lambda words: load_config(RewardModelConfig, REWARD_MODEL_RECIPES, words, door="reward"),
    "rlhf": lambda words: load_config(RlhfConfig, RLHF_RECIPES, words, door="rlhf"),
    "sweep": lambda words: swept(load_config(SweepConfig, SWEEP_RECIPES, words, door="sweep")),
    "demo": lambda words: load_config(DemoConfig, DEMO_RECIPES, ["--recipe", "demo", *words], door="demo"),
    "evaluate": lambda words: load_task(EVALUATE_TASKS, words, door="evaluate"),
    "index": lambda words: load_config(IndexConfig, {}, words, door="index"),
    "serve": lambda words: load_config(ServeConfig, SERVE_RECIPES, words, door="serve"),
    "keys": lambda words: keyed(words),
    "check": lambda words: checked(words),
}


def keyed(words: list[str]) -> None:
    """On a file of the test's folder, which knows the name where the command needs it."""
    verb, name = words[0], words[1]
    if verb == "remove":
        run_keys(["add", name, *words[2:]])
    elif verb == "list":
        run_keys(["add", "somebody", *words[1:]])
    assert run_keys(words)


def checked(words: list[str]) -> None:
    """The shipped files have no finding."""
    order = read_order([str(ROOT / word) if "/" in word else word for word in words])
    assert check_files(order, tuple(DOORS)) == []


def swept(sweep: SweepConfig) -> None:
    """Every trial's own configuration too."""
    from fmray.pipeline.sweep import open_sweep

    trials = open_sweep(sweep)
    for number in trials.numbers:
        trials.config(number)


def commands() -> list[str]:
    """`fmray …` and `python jobs/….py …` lines of the code blocks, and in single back-ticks where they are whole."""
    text = f"{README}\n{RUNBOOK}".replace("\\\n", " ")
    blocks = (
        "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.DOTALL))
        + "\n"
        + "\n".join(re.findall(r"`([^`\n]+)`", text))
    )
    found = re.findall(r"(?:fmray|python jobs/)[ ]?(\w+)(?:\.py)? ([^\n|#]+)", blocks)
    return [
        f"{door} {rest.strip()}"
        for door, rest in found
        if door in PARSERS and "…" not in rest and "--help" not in rest
    ]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_run.yaml").write_text("train: {steps: 5}\n")
    door, *words = shlex.split(command)
    PARSERS[door]([word.replace("=S", "=1") if word == "run.seed=S" else word for word in words])


def test_there_are_commands_to_check() -> None:
    found = {command.partition(" ")[0] for command in commands()}
    assert found == set(PARSERS)
    assert len(commands()) >= 18


def test_the_make_targets_start_the_demo_that_they_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"-m fmray\.cli demo ([^\n]+)", makefile)
    assert len(found) == 2
    kinds = set()
    for line in found:
        config = load_config(DemoConfig, DEMO_RECIPES, ["--recipe", "demo", *line.split()], door="demo")
        kinds.add((config.clip.runtime.kind, config.rlhf.runtime.kind, config.sweep.runtime.kind))
        assert config.run.fresh
    assert kinds == {("ray",) * 3, ("local",) * 3}


def test_the_reward_function_gives_a_number_for_each_text() -> None:
    [code] = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def " in code]
    names: dict[str, Callable[[list[str], list[str]], list[float]]] = {}
    exec(code, names)
    scores = names["brevity"](["short", "a longer answer"], ["a", "b"])
    assert len(scores) == 2
    assert scores[0] > scores[1]


def test_every_door_and_every_part_of_the_map_is_there() -> None:
    tree = re.search(r"```\nfmray/\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    for name in re.findall(r"^  ([a-z_]+(?:\.py|/))", tree.group(1), re.MULTILINE):
        assert (ROOT / "fmray" / name).exists(), name
    folders = {
        path.name for path in (ROOT / "fmray").iterdir() if path.is_dir() and not path.name.startswith("_")
    }
    assert folders <= set(re.findall(r"([a-z]+)/", tree.group(1)))
    for door in DOORS:
        assert door in README
    for path in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:fmray|jobs|tests|docs)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name


def test_no_placeholder_is_left() -> None:
    assert "@@" not in README
