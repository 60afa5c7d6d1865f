"""What the README says is true: its commands parse, its map names what is there, its figures' places exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from fmray.cli import DOORS
from fmray.config.loading import load_config
from fmray.config.recipes import EVALUATE_RECIPES, PRETRAIN_RECIPES, SERVE_RECIPES
from fmray.config.schema import EvaluateRunConfig, PretrainConfig, ServeConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

PARSERS: dict[str, Callable[[list[str]], object]] = {
    "pretrain": lambda words: load_config(PretrainConfig, PRETRAIN_RECIPES, words, door="pretrain"),
    "evaluate": lambda words: load_config(EvaluateRunConfig, EVALUATE_RECIPES, words, door="evaluate"),
    "serve": lambda words: load_config(ServeConfig, SERVE_RECIPES, words, door="serve"),
}


def commands() -> list[str]:
    """`fmray …` and `python jobs/….py …` lines of the code blocks, and in single back-ticks where they are whole."""
    text = README.replace("\\\n", " ")
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
    assert len(commands()) >= 8


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
