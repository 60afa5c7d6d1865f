"""Recipes, files and overrides; every mistake named with key, value and cure."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fmray.config.loading import HelpRequested, dump_json, load_config, merge, validate
from fmray.config.recipes import PRETRAIN_RECIPES
from fmray.config.schema import EvaluateRunConfig, PretrainConfig, Section
from fmray.config.serving import ServeConfig
from fmray.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent.parent


def load(*arguments: str) -> PretrainConfig:
    return load_config(PretrainConfig, PRETRAIN_RECIPES, arguments, door="test")


def test_recipe_then_file_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "over.toml").write_text("[train]\nsteps = 7\nlog_every = 3\n")
    (tmp_path / "over.yaml").write_text("optimizer:\n  lr: 5.0e-4\n")
    config = load(
        *("--recipe", "clip_tiny", "--config", str(tmp_path / "over.toml")),
        *("--config", str(tmp_path / "over.yaml"), "train.steps=9"),
    )
    assert (config.train.steps, config.train.log_every, config.optimizer.lr) == (9, 3, 5e-4)
    assert config.data.batch_size == PRETRAIN_RECIPES["clip_tiny"]().data.batch_size


@pytest.mark.parametrize(
    "words",
    [("data.source.kind=folder", "data.source.path=x"), ("data.source.path=x", "data.source.kind=folder")],
)
def test_another_kind_of_source_replaces_the_keys_of_the_old_one_in_any_order(words: tuple[str, str]) -> None:
    source = load("--recipe", "clip_emoji", *words).data.source
    assert source.model_dump() == {"kind": "folder", "path": "x", "template": "a photo of a {}"}


def test_values_are_what_people_mean() -> None:
    config = load(
        *(
            "optimizer.lr=1e-3",
            "runtime.kind=ray",
            "runtime.workers=[1,4]",
            "data.batch_size=12",
            "train.evaluate_every=null",
        ),
        *(
            "report.tensorboard=true",
            "parts.vision.train=last:2",
            "evaluate.templates=['{}', 'a photo of a {}']",
        ),
    )
    assert config.optimizer.lr == 0.001
    assert list(config.runtime.worker_counts) == [1, 2, 3, 4]
    assert config.train.evaluate_every is None
    assert config.report.tensorboard is True
    assert config.parts["vision"].train == "last:2"
    assert config.evaluate.templates == ("{}", "a photo of a {}")


def test_a_key_laid_over_a_section_keeps_the_roots_own_defaults() -> None:
    config = load_config(EvaluateRunConfig, {}, ["checkpoint=x", "run.storage=elsewhere"], door="test")
    assert (config.run.name, config.run.storage) == ("evaluate", "elsewhere")


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        (["--recipe", "clip_emojy"], "--recipe", "did you mean clip_emoji?"),
        (["--recipe"], "--recipe", "needs a value"),
        (["train.stepz=3"], "train.stepz", "did you mean train.steps?"),
        (["traim.steps=3"], "traim", "did you mean train?"),
        (["xyzzy=3"], "xyzzy", "there are: task, run, runtime"),
        (["train.steps=0"], "train.steps", "greater than or equal to 1"),
        (["train.steps=many"], "train.steps", "valid integer"),
        (["train.steps"], "train.steps", "write key=value"),
        (["--steps=3"], "--steps=3", "keys are written without dashes"),
        (["runtime.kind=rey"], "runtime.kind", "must be one of local, ray; did you mean ray?"),
        (["runtime.workers=2"], "runtime.workers", "set runtime.kind=ray"),
        (["runtime.kind=ray", "runtime.workers=[4,1]"], "runtime.workers", "min <= max"),
        (["runtime.kind=ray", "runtime.workers=3"], "data.batch_size", "must divide among 3 workers"),
        (["data.source.kind=foldr"], "data.source.kind", "did you mean folder?"),
        (["data.source.kind=folder"], "data.source.path", "is required"),
        (["data.source.langages=[en]"], "data.source.langages", "did you mean data.source.languages?"),
        (["parts.vison.lr=1"], "parts.vison", "did you mean vision?"),
        (["parts.vision.train=some"], "parts.vision.train", ""),
        (["run.name=../elsewhere"], "run.name", "pattern"),
        (["model.image.normalize=custom"], "model.image.mean/std", "give both"),
        (["evaluate.templates=['a photo']"], "evaluate.templates", "write {} once"),
        (["engine.offload=all"], "engine.offload", "needs engine.kind=deepspeed"),
    ],
)
def test_mistakes_name_key_and_cure(arguments: list[str], key: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert caught.value.key == key
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    for name, text in {"a.yaml": "a: [1", "b.toml": "= 3", "c.yaml": "- 1\n- 2\n"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=name):
            load("--config", str(tmp_path / name))


@pytest.mark.parametrize("recipe", PRETRAIN_RECIPES)
def test_the_resolved_configuration_reads_back_as_itself(recipe: str, tmp_path: Path) -> None:
    config = load("--recipe", recipe)
    (tmp_path / "resolved.json").write_text(dump_json(config))
    assert load("--config", str(tmp_path / "resolved.json")) == config
    assert validate(PretrainConfig, json.loads(dump_json(config))) == config


def test_merge_does_not_touch_its_arguments() -> None:
    base = {"a": {"b": 1, "c": 2}}
    assert merge(base, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}
    assert base == {"a": {"b": 1, "c": 2}}


def every_field(section: type[Section], seen: set[type[Section]]) -> list[str]:
    undocumented = []
    for name, field in section.model_fields.items():
        if not field.description and name != "kind" and name != "path":
            undocumented.append(f"{section.__name__}.{name}")
    for other in Section.__subclasses__():
        if other not in seen:
            seen.add(other)
            undocumented += every_field(other, seen)
    return undocumented


def test_every_key_has_a_doc_and_stands_in_help() -> None:
    assert every_field(PretrainConfig, {PretrainConfig}) == []
    with pytest.raises(HelpRequested) as caught:
        load("--help")
    text = str(caught.value)
    for key in (
        "train.steps",
        "data.source.kind=webdataset",
        "parts.<part>.lr",
        "runtime.workers",
        "clip_emoji",
    ):
        assert key in text
    with pytest.raises(HelpRequested, match="checkpoint"):
        load_config(ServeConfig, {}, ["--help"], door="serve")


def _seconds_of_children() -> float:
    """Of a core: what other work on the machine takes is not counted."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_answers_in_under_a_second() -> None:
    best = 99.0
    for _ in range(3):
        started = _seconds_of_children()
        done = subprocess.run(
            [sys.executable, "jobs/pretrain.py", "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        best = min(best, _seconds_of_children() - started)
        assert "train.steps" in done.stdout
    assert best < 1.0
