"""A PPO run's page, drawn from a real tiny run; a reward model's, from numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fmray.cli import door, rlhf
from fmray.config.loading import dump_json
from fmray.config.rlhf import RlhfConfig
from fmray.pipeline.report import render
from fmray.pipeline.rlhf_report import (
    PHASES,
    ppo_curves,
    reward_model_sections,
    side_by_side,
    verdict_table,
)
from fmray.pipeline.second_opinion import Answers, all_answers
from fmray.pipeline.sections import LineChart, Report, SideBySide, StackedChart, Table
from fmray.pipeline.verdict import Finding, verdict
from fmray.runtime.run_folder import RunFolder
from tests.stories import story_run, tiny_t5

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RlhfConfig, Reports, tuple[Answers, ...]]:
    """Three iterations with an evaluation in the middle; one of the rewards is called as a measure is."""
    folder = tmp_path_factory.mktemp("run")
    options: dict[str, Any] = {
        "train.iterations": 4,
        "train.evaluate_every": 2,
        "rewards.length": {"kind": "length", "min_tokens": 3, "normalize": "none"},
    }
    config = story_run(folder, tiny_t5(folder / "t5"), **options)
    path = folder / "story.json"
    path.write_text(dump_json(config), encoding="utf-8")
    assert door(rlhf, ["--config", str(path)]) == 0
    home = RunFolder.of(config.run)
    return config, home.metrics(), all_answers(home, home.metrics())


def test_every_curve_has_its_points(run: tuple[RlhfConfig, Reports, tuple[Answers, ...]]) -> None:
    config, reports, held_out = run
    assert [answers.version for answers in held_out] == [0, 2, 4]
    sections = ppo_curves(reports, config, held_out)
    charts = {section.title: section for section in sections if isinstance(section, LineChart)}
    for name in config.rewards:
        samples, judged = charts[f"Reward: {name}, raw"].lines
        assert [x for x, _ in samples.finite] == [1, 2, 3, 4]
        assert [x for x, _ in judged.finite] == [0, 2, 4]
        by_run = [line[f"eval/{name}/raw"] for line in reports if f"eval/{name}/raw" in line]
        assert [y for _, y in judged.finite] == pytest.approx(by_run, abs=1e-6)
    for title in ("Combined reward", "KL coefficient", "Entropy", "Length", "Explained variance"):
        assert len(charts[title].lines[0].finite) == 4, title
    assert all(len(line.finite) == 4 for line in charts["Clipped and ended"].lines)
    assert "</html>" in render(Report("run", "", (), tuple(sections)))


def test_phases_add_up_to_the_iteration(run: tuple[RlhfConfig, Reports, tuple[Answers, ...]]) -> None:
    config, reports, held_out = run
    [stacked] = [part for part in ppo_curves(reports, config, held_out) if isinstance(part, StackedChart)]
    assert stacked.parts == PHASES
    whole = [line["time/step"] for line in reports if "time/step" in line]
    assert [sum(heights) for _, heights in stacked.bars] == pytest.approx(whole, rel=1e-6)


def test_answers_stand_beside_each_other_with_their_rewards(
    run: tuple[RlhfConfig, Reports, tuple[Answers, ...]],
) -> None:
    _, _, held_out = run
    section: SideBySide = side_by_side(held_out[0], held_out[-1], shown=2)
    assert len(section.rows) == 2
    prompt, (before, after) = section.rows[1]
    row = len(held_out[0].prompts) // 2
    assert prompt == held_out[0].prompts[row]
    assert after.text == (held_out[-1].responses[row] or "(nothing)")
    assert dict(before.scores)["letters"] == pytest.approx(float(held_out[0].raw["letters"][row]), abs=1e-3)


def test_a_verdict_of_a_real_run_is_a_table(run: tuple[RlhfConfig, Reports, tuple[Answers, ...]]) -> None:
    config, reports, held_out = run
    findings = verdict(reports, config, held_out[0], held_out[-1], [])
    table = verdict_table(findings, 4)
    assert [row[0] for row in table.rows] == [finding.what for finding in findings]
    assert verdict_table((Finding("x", 0.0, 1.0, 0.5, "at least 2", False),), 4).rows[0][-1] == "✗ missed"


def test_a_reward_models_parts_are_told_apart() -> None:
    bins = {part: [{"confidence": 0.6, "accuracy": 0.5, "count": 4}] for part in ("a_few", "b")}
    shared = {"accuracy": 0.75, "calibration_error": 0.1, "brier": 0.4}
    metrics = {f"eval/{part}/{key}": value for part in bins for key, value in shared.items()}
    evaluation: Mapping[str, Any] = {"metrics": metrics, "by_confidence": bins}
    table, chart, _ = reward_model_sections([{"step": 1, "train/loss": 0.7}], evaluation)
    assert isinstance(table, Table)
    assert table.columns == ("held-out part", "texts", "right", "ECE", "Brier")
    assert table.rows[0] == ("a few", 4, 0.75, 0.1, 0.4)
    assert isinstance(chart, LineChart)
    assert chart.lines[-1].points == ((0.6, 0.6), (1.0, 1.0))
