"""The demo road: CLIP and a VQA model trained, measured, served; a reward model, PPO under it, a verdict, a sweep; a report.

Each stage hands the next a folder or an address, nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmray.config.demo import DemoConfig
from fmray.config.loading import dump_json
from fmray.pipeline.demo_clip import ClipPart, run_clip
from fmray.pipeline.demo_report import write_demo_report
from fmray.pipeline.demo_rlhf import RlhfPart, run_rlhf
from fmray.pipeline.demo_stages import Stages, placed
from fmray.pipeline.demo_vqa import VqaPart, run_vqa
from fmray.runtime.machine import machine, versions
from fmray.runtime.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Demo:
    """What the parts found; None: it was not asked for."""

    config: DemoConfig
    folder: Path
    clip: ClipPart | None
    vqa: VqaPart | None
    rlhf: RlhfPart | None
    seconds: dict[str, float]

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: everything that the report draws, as numbers."""
        return {
            "clip": self.clip.summary if self.clip else None,
            "vqa": self.vqa.summary if self.vqa else None,
            "rlhf": self.rlhf.summary if self.rlhf else None,
            "seconds": self.seconds,
            "machine": machine(),
            "versions": versions(),
        }


def run_demo(config: DemoConfig) -> Demo:
    """The parts that are asked for; writes report.html and summary.json into the demo's folder, the runs lie beside them."""
    home, runs, stage = RunFolder.of(config.run), placed(config), Stages()
    if config.run.fresh:
        for name in runs.names(config.parts):
            home.remove(name)
    home.write_text(dump_json(config), "demo.json")
    demo = Demo(
        config,
        Path(home.url),
        run_clip(runs.clip, stage) if "clip" in config.parts else None,
        run_vqa(runs.vqa, stage) if "vqa" in config.parts else None,
        run_rlhf(runs, config.second, stage) if "rlhf" in config.parts else None,
        stage.seconds,
    )
    summary = demo.summary
    home.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", "summary.json")
    write_demo_report(summary, demo.clip, demo.vqa, demo.rlhf, config, demo.folder)
    return demo
