"""A PPO run's part of a page: its curves, where its seconds went, its answers before and after, the verdict on them.

Also its reward model's: how often it is right, and how far its confidence can be believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fmray.config.rewards import LengthReward, RepetitionReward
from fmray.config.rlhf import RlhfConfig
from fmray.pipeline.charts import Line
from fmray.pipeline.second_opinion import Answers
from fmray.pipeline.sections import LineChart, Said, Section, SideBySide, StackedChart, Table
from fmray.pipeline.verdict import Finding

Reports = Sequence[Mapping[str, Any]]
"""The lines of a run's metrics.jsonl."""

PHASES = ("act", "judge", "credit", "learn", "refresh")
SHOWN = 10
"""Prompts whose answers are shown."""
MEASURES = {
    "accuracy": "right",
    "commonest_label": "chance",
    "calibration_error": "ECE",
    "brier": "Brier",
}
"""What is shown of a reward model, and its name on the page."""


def curve(reports: Reports, key: str, name: str) -> Line:
    """One metric over steps."""
    return Line(name, tuple((line["step"], line[key]) for line in reports if key in line))


# --------------------------------------------------------------------------------------------------------- the PPO run


def ppo_curves(reports: Reports, config: RlhfConfig, held_out: Sequence[Answers]) -> list[Section]:
    """Reward and score, each raw reward with its held-out means, KL, and what tells whether learning is sound."""

    def chart(
        title: str, unit: str, *lines: tuple[str, str], note: str = "", zero: bool = False
    ) -> LineChart:
        drawn = tuple(curve(reports, key, name) for key, name in lines)
        return LineChart(title, drawn, "iteration", unit, from_zero=zero, note=note)

    together = chart(
        "Combined reward",
        "reward",
        ("ppo/score", "weighted sum of the normalised rewards"),
        ("ppo/rlhf_reward", "minus the KL penalty"),
        note="Each reward is normalised by the run's own past, so the sum rises less than the rewards do.",
    )
    kl = config.ppo.kl
    aim = f"the controller aims at {kl.target:g}" if kl.controller == "adaptive" else "a fixed coefficient"
    sections: list[Section] = [
        together,
        *(reward_curve(reports, name, config, held_out) for name in config.rewards),
        chart(
            "KL to the starting policy",
            "nats an answer",
            ("ppo/kl", "samples"),
            ("eval/kl", "held-out"),
            note=f"{aim[0].upper()}{aim[1:]}.",
            zero=True,
        ),
        chart("KL coefficient", "coefficient", ("ppo/kl_coefficient", "coefficient"), zero=True),
        chart("Entropy", "nats a token", ("ppo/entropy", "entropy"), zero=True),
        chart("Length", "tokens", ("ppo/length", "samples"), ("eval/length", "held-out"), zero=True),
        chart(
            "Clipped and ended",
            "share",
            ("ppo/clip_fraction", "ratios clipped"),
            ("ppo/value_clip_fraction", "values clipped"),
            ("ppo/eos_rate", "answers that ended by themselves"),
            zero=True,
        ),
    ]
    if any("ppo/explained_variance" in line for line in reports):
        note = "Share of the returns' variance that the critic foresaw."
        sections.append(chart("Explained variance", "share", ("ppo/explained_variance", "critic"), note=note))
    return [*sections, phases(reports, local=config.runtime.kind == "local")]


def reward_curve(reports: Reports, name: str, config: RlhfConfig, held_out: Sequence[Answers]) -> LineChart:
    """A reward as its scorer gave it, before normalisation."""
    reward = config.rewards[name]
    rule = isinstance(reward, LengthReward | RepetitionReward)
    lines = (
        curve(reports, f"reward/{name}/raw", "samples"),
        Line(
            "held-out", tuple((answers.version, float(answers.raw[name].nanmean())) for answers in held_out)
        ),
    )
    note = f"{'A rule' if rule else reward.kind.capitalize()}, weight {reward.weight:g}."
    return LineChart(f"Reward: {name}, raw", lines, "iteration", "mean", note=note)


def phases(reports: Reports, *, local: bool) -> StackedChart:
    """Where an iteration's seconds went."""
    bars = tuple(
        (float(line["step"]), tuple(float(line[f"time/{phase}"]) for phase in PHASES))
        for line in reports
        if "time/act" in line
    )
    note = "Means over the iterations stand beside the names."
    if local:
        note += " In one process an answer is judged as soon as it is there, so judging counts as act."
    return StackedChart("Seconds of an iteration, by phase", PHASES, bars, "iteration", "seconds", note)


def side_by_side(before: Answers, after: Answers, shown: int = SHOWN) -> SideBySide:
    """The same held-out prompts' answers with their raw rewards: evenly spread, none chosen."""
    count = len(before.prompts)
    rows = tuple(
        (before.prompts[row], tuple(said(answers, row) for answers in (before, after)))
        for row in (place * count // min(shown, count) for place in range(min(shown, count)))
    )
    note = (
        f"{len(rows)} of {count} held-out prompts, evenly spread, none chosen; raw rewards below each answer."
    )
    columns = ("starting policy", f"after {after.version} iterations")
    return SideBySide("Answers before and after", columns, rows, note)


def said(answers: Answers, row: int) -> Said:
    """One answer with what each reward gave it."""
    scores = tuple((name, round(float(raw_N[row]), 3)) for name, raw_N in answers.raw.items())
    return Said(answers.responses[row] or "(nothing)", scores)


def verdict_table(findings: Sequence[Finding], prompts: int) -> Table:
    """Every measure with its bar."""
    rows = tuple(
        (
            f.what,
            f.detail,
            round(f.before, 4),
            round(f.after, 4),
            f.change_text.replace(" ", "\u00a0"),
            f.bar,
            f.met_text,
        )
        for f in findings
    )
    note = (
        f"{prompts} held-out prompts, the same before and after; ± is the standard error of a change over prompts. "
        "Second judges were never trained against."
    )
    columns = ("what", "", "start", "after", "change", "bar", "met")
    return Table("Verdict", columns, rows, note, wide=True)


# ----------------------------------------------------------------------------------------------------- its reward model


def reward_model_sections(reports: Reports, evaluation: Mapping[str, Any]) -> list[Section]:
    """Accuracy on every held-out part, accuracy by confidence, and the loss. `evaluation`: evaluation.json's content."""
    metrics, bins = evaluation["metrics"], evaluation["by_confidence"]
    known = {
        key: name for key, name in MEASURES.items() if all(f"eval/{part}/{key}" in metrics for part in bins)
    }
    rows = tuple(
        (
            part.replace("_", " "),
            sum(bin["count"] for bin in bins[part]),
            *(round(metrics[f"eval/{part}/{key}"], 3) for key in known),
        )
        for part in bins
    )
    columns = ("held-out part", "texts", *known.values())
    note = "Chance: the share of the commonest label. ECE: how far confidence is from accuracy, on average over its bins."
    lines = tuple(
        Line(part.replace("_", " "), tuple((bin["confidence"], bin["accuracy"]) for bin in bins[part]))
        for part in bins
    )
    lowest = min((x for line in lines for x, _ in line.points), default=0.5)
    ideal = Line("as right as it is sure", ((lowest, lowest), (1.0, 1.0)))
    return [
        Table("Reward model: held-out accuracy", columns, rows, note),
        LineChart(
            "Reward model: accuracy by confidence", (*lines, ideal), "mean confidence of a bin", "accuracy"
        ),
        LineChart("Reward model: loss", (curve(reports, "train/loss", "classification"),), "step", "nats"),
    ]
