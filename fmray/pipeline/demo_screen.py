"""The demo's results on one screen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from fmray.pipeline.charts import number
from fmray.pipeline.demo import Demo
from fmray.pipeline.demo_clip import ClipPart
from fmray.pipeline.demo_report import exchange
from fmray.pipeline.demo_rlhf import RlhfPart
from fmray.pipeline.demo_vqa import VqaPart
from fmray.tuning.trials import keys_text

MEASURED = ("exact_match", "question_only", "majority")
"""Columns of the VQA model's results."""


def screen(demo: Demo) -> str:
    """Plain lines."""
    lines = [
        "",
        *(clip_lines(demo.clip) if demo.clip else ()),
        *(vqa_lines(demo.vqa) if demo.vqa else ()),
        *(rlhf_lines(demo.rlhf) if demo.rlhf else ()),
        "seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in demo.seconds.items()),
        f"report:  {demo.folder / 'report.html'}",
    ]
    return "\n".join(lines)


def clip_lines(part: ClipPart) -> Iterator[str]:
    """Loss, recall, what the endpoint said."""
    summary = part.summary
    results, train = summary["results"], summary["train"]
    yield f"CLIP, {train['steps']} steps: loss {train['first_loss']:.3f} → {train['last_loss']:.3f}"
    yield ""
    yield f"{'retrieval on unseen concepts':<34}{'R@1':>8}{'R@5':>8}{'R@10':>8}"
    for language in part.config.evaluate.languages:
        prefix = "eval" if language == "en" else f"eval/{language}"
        for direction, words in (("image_to_text", "picture → name"), ("text_to_image", "name → picture")):
            row = [results[f"{prefix}/{direction}/r{k}"] for k in (1, 5, 10)]
            yield f"  {language} {words:<29}" + "".join(f"{value:8.3f}" for value in row)
    yield ""
    yield "asked through the openai client:"
    for turn in part.conversation[:4]:
        best = ", ".join(f"{a['name']} {a['cosine']:.2f}" for a in turn["answers"][:3])
        yield f"  {turn['picture']:<22} → {best}  ({turn['milliseconds']:.0f} ms)"
    yield ""


def vqa_lines(part: VqaPart) -> Iterator[str]:
    """Loss, right answers by type beside those that need no picture, what the endpoint said."""
    summary = part.summary
    results, train = summary["results"], summary["train"]
    yield f"VQA, {train['steps']} steps: loss {train['first_loss']:.3f} → {train['last_loss']:.3f}"
    yield ""
    names = ("model", "question only", "majority")
    title = f"right answers, {summary['questions']:,} test questions"
    yield f"{title:<42}" + "".join(f"{name:>15}" for name in names)
    whole = {key: results[f"eval/{key}"] for key in MEASURED}
    for kind, row in (("all", whole), *((row["kind"], row) for row in summary["kinds"])):
        yield f"  {kind or 'untyped':<40}" + "".join(f"{row[key]:15.3f}" for key in MEASURED)
    yield ""
    yield "asked through the openai client:"
    for turn in summary["endpoint"][:4]:
        yield f"  {turn['picture']:<22} {exchange(turn)}  ({turn['milliseconds']:.0f} ms)"
    yield ""


def rlhf_lines(part: RlhfPart) -> Iterator[str]:
    """The reward model's accuracy, the verdict, one prompt's answers, the sweep's best."""
    metrics = part.reward_evaluation["metrics"]
    parts = [name for name in metrics if name.endswith("/accuracy")]
    accuracies = ", ".join(f"{name.split('/')[1].replace('_', ' ')} {metrics[name]:.3f}" for name in parts)
    yield f"reward model, held-out accuracy: {accuracies}"
    yield ""
    title = f"PPO, {part.after.version} iterations, {len(part.after.prompts)} held-out prompts"
    yield f"{title:<44}{'start':>8}{'after':>8}  bar"
    for found in part.findings:
        bar = f"  {found.bar} {found.met_text}" if found.bar else ""
        yield f"  {found.what:<42}{number3(found.before):>8}{number3(found.after):>8}{bar}"
    yield ""
    yield f"{part.before.prompts[0]} …"
    yield f"  start: {textwrap.shorten(part.before.responses[0], 100, placeholder=' …')}"
    yield f"  after: {textwrap.shorten(part.after.responses[0], 100, placeholder=' …')}"
    yield ""
    best = part.sweep.best
    kept = f"best {best.name} with {keys_text(best.keys)}" if best else "none kept the constraints"
    yield f"sweep, {len(part.sweep.rows)} trials: {kept}"
    yield ""


def number3(value: float) -> str:
    """Three digits behind the point."""
    return number(round(value, 3))
