"""The demo's second part: a reward model, PPO under it, what judges that were not trained against say of it, a small sweep."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fmray.config.demo import SecondOpinionConfig
from fmray.errors import ResourceError
from fmray.pipeline.demo_stages import Runs, Stages, fetch_for, run_to_its_end, tell
from fmray.pipeline.second_opinion import Answers, all_answers, second_opinions
from fmray.pipeline.sweep import SweepEnd, open_sweep, run_sweep
from fmray.pipeline.verdict import Finding, all_met, first_and_last, verdict
from fmray.rlhf.loop import train_ppo
from fmray.rlhf.roles import pool_plan
from fmray.runtime.context import choose_device, prepare_process
from fmray.runtime.run_folder import RunFolder
from fmray.training.reward_model import train_reward_model
from fmray.tuning.table import shown_metrics
from fmray.tuning.trials import Trials


@dataclass(frozen=True, slots=True)
class RlhfPart:
    """What was found."""

    runs: Runs
    held_out: tuple[Answers, ...]
    """The answers of every version that was evaluated."""
    findings: tuple[Finding, ...]
    sweep: SweepEnd

    @property
    def before(self) -> Answers:
        """The starting policy's."""
        return self.held_out[0]

    @property
    def after(self) -> Answers:
        """The final policy's."""
        return self.held_out[-1]

    @property
    def reward_reports(self) -> list[dict[str, Any]]:
        """The reward model's metrics.jsonl."""
        return RunFolder.of(self.runs.reward.run).metrics()

    @property
    def reward_evaluation(self) -> dict[str, Any]:
        """The reward model's evaluation.json."""
        found: dict[str, Any] = json.loads(RunFolder.of(self.runs.reward.run).read_text("evaluation.json"))
        return found

    @property
    def reports(self) -> list[dict[str, Any]]:
        """The PPO run's metrics.jsonl."""
        return RunFolder.of(self.runs.rlhf.run).metrics()

    @property
    def trials(self) -> Trials:
        """The sweep's trials."""
        return open_sweep(self.runs.sweep)

    @property
    def summary(self) -> dict[str, Any]:
        """Everything that the report draws, as numbers."""
        best, shown = self.sweep.best, shown_metrics(self.trials)
        rows = [
            {
                "name": row.name,
                "keys": row.keys,
                "status": row.status,
                "metrics": {name: row.metrics.get(name) for name in shown},
            }
            for row in self.sweep.rows
        ]
        return {
            "reward_model": self.reward_evaluation["metrics"],
            "verdict": [asdict(finding) for finding in self.findings],
            "every_bar_met": all_met(self.findings),
            "iterations": self.after.version,
            "sweep": {"best": best.name if best else None, "trials": rows},
        }


def run_rlhf(runs: Runs, second: SecondOpinionConfig, stage: Stages) -> RlhfPart:
    """Reward model, PPO, verdict, sweep."""
    reward, rlhf = runs.reward, runs.rlhf
    open_sweep(runs.sweep)  # what is wrong with its trials is said now, not after the PPO run
    with stage("assets of PPO"):
        fetch_for(reward, rlhf, second)
    with stage("reward model"):
        run_to_its_end("the reward model", train_reward_model, reward, reward.train.steps)
    with stage("PPO"):
        run_to_its_end("PPO", train_ppo, rlhf, rlhf.train.iterations, pool_plan(rlhf))
    with stage("second opinions"):
        held_out, findings = judge(runs, second)
    with stage("sweep"):
        end = run_sweep(runs.sweep, tell)
        if not end.finished:
            raise ResourceError(
                "the sweep was told to stop, and has saved; the same command with run.fresh=false goes on"
            )
    return RlhfPart(runs, held_out, findings, end)


def judge(runs: Runs, second: SecondOpinionConfig) -> tuple[tuple[Answers, ...], tuple[Finding, ...]]:
    """The answers of every version that was evaluated, and the verdict on the last against the first."""
    rlhf = runs.rlhf
    prepare_process(rlhf.runtime)
    folder = RunFolder.of(rlhf.run)
    reports = folder.metrics()
    first_and_last(reports)
    held_out = all_answers(folder, reports)
    before, after = held_out[0], held_out[-1]
    opinions = second_opinions(second, runs.reward, before, after, choose_device(rlhf.runtime.device))
    return held_out, verdict(reports, rlhf, before, after, opinions)
