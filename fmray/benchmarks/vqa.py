"""`fmray benchmark vqa`: VQA training beside transformers' Trainer, what the feature cache adds, answers batched and one by one.

Every figure is the median of repeats that alternate between the sides (A B A B …) in one process while the other waits.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from fmray.benchmarks.command import read_options, run_parts
from fmray.benchmarks.peers import Measured
from fmray.benchmarks.table import Row
from fmray.benchmarks.vqa_bench import FULL, QUICK, VqaBench
from fmray.benchmarks.vqa_ours import OurLoop
from fmray.benchmarks.vqa_trainer import Questions, TrainerLoop, peer_versions
from fmray.data.dialogue_loader import decoded_pictures, group_dialogues
from fmray.models.answering import Answering
from fmray.models.mllm_answering import build_mllm
from fmray.runtime.context import keep_freed_memory
from fmray.types import Dialogue

SAME_LOSS = {"fp32": 1e-5, "bf16": 2e-2}
"""First losses of both sides differ by less than this share of them."""
HOW_THEIRS = (
    "Theirs is transformers' Trainer with the same VqaModel and weights: a dataset of single questions with decoded pictures and "
    "token ids at hand, a padding collator, both towers on every row in every step, full logits; frozen towers have "
    "requires_grad off and stay in evaluation mode as a careful user keeps them, so no graph is made there. AdamW (fused), "
    "clipping, autocast and the process's memory settings are the same as ours. Ours is past its first epoch: pictures are "
    "decoded, questions have passed their locked tower once, and the cache of features, where there is one, is warm."
)


# ------------------------------------------------------------------------------------------------------------------ training


def train(bench: VqaBench) -> list[Row]:
    """Whole steps of the recipe: a ViT that learns, a locked DistilBERT, a small GPT-2."""
    rows = _same_loss(bench, "train", frozen=False)
    ours = OurLoop.of(bench, bench.config("train"))
    found = _alternating(bench, {"ours": ours})
    what = f"training in bf16, a ViT that learns and a locked question tower, {_batch(bench)}"
    rows.append(_faster(what, found["ours"], found["theirs"], 1.3))
    return rows


def cache(bench: VqaBench) -> list[Row]:
    """The same with locked towers on both sides: our features warm, and made anew in every step."""
    rows = _same_loss(bench, "cache", frozen=True)
    config = bench.config("cache", frozen=True)
    plain = config.replace(data=config.data.replace(cache_features=False))
    loops = {
        "cached": OurLoop.of(bench, config, bench.folder / "features"),
        "plain": OurLoop.of(bench, plain),
    }
    assert loops["cached"].learner.features is not None
    assert loops["plain"].learner.features is None
    found = _alternating(bench, loops)
    what = f"training in bf16, both towers locked, {_batch(bench)}"
    rows += [
        _faster(f"{what}: features cached and warm", found["cached"], found["theirs"], 3.0),
        _faster(f"{what}: cache_features=false", found["plain"], found["theirs"], None),
        _faster(
            f"{what}: features cached and warm; before: cache_features=false",
            found["cached"],
            found["plain"],
            None,
        ),
    ]
    return rows


def _batch(bench: VqaBench) -> str:
    sizes = bench.sizes
    return f"{sizes.batch} pictures with up to {sizes.questions} questions, {torch.get_num_threads()} threads"


def _faster(what: str, ours: Measured, theirs: Measured, bar: float | None) -> Row:
    unit = "questions/s"
    return Row(what, ours.shown(unit, 4), theirs.shown(unit, 4), ours.median / theirs.median, bar)


def _same_loss(bench: VqaBench, name: str, *, frozen: bool) -> list[Row]:
    """Whether both sides compute the same: loss and gradient of the first batch, before anything is timed."""
    rows = []
    for precision, bar in SAME_LOSS.items():
        config = bench.config(f"{name}-{precision}", precision=precision, frozen=frozen)
        ours = OurLoop.of(bench, config, bench.folder / f"features-{precision}")
        theirs = _trainer(bench, ours)
        loss, norm = theirs.loss(_questions(bench, ours, ours.first_batch().dialogues))
        mine, my_norm = ours.first_loss()
        what = f"{name}: loss of the first batch in {precision}, same weights: relative difference"
        rows.append(Row(what, f"{mine:.7f}", f"{loss:.7f}", abs(mine / loss - 1), bar, "lower"))
        bench.notes.append(
            f"{name}: norm of that batch's gradient in {precision}: ours {my_norm:.6f}, theirs {norm:.6f}."
        )
    return rows


def _alternating(bench: VqaBench, loops: dict[str, OurLoop]) -> dict[str, Measured]:
    """Questions/s of each of our loops and, under "theirs", of the Trainer's, in turn."""
    sizes, ours = bench.sizes, next(iter(loops.values()))
    dialogues = [bench.train[index] for group in ours.dataset.groups for index in group]
    rows, theirs = _questions(bench, ours, dialogues), _trainer(bench, ours)
    batch = len(ours.first_batch().dialogues)
    found: dict[str, list[float]] = {name: [] for name in [*loops, "theirs"]}
    for _ in range(sizes.repeats):
        for name, loop in loops.items():
            found[name].append(1 / loop.seconds_per_question(warm=sizes.warm, steps=sizes.steps))
        seconds = theirs.seconds(rows, batch, warm=sizes.warm, steps=sizes.steps)
        found["theirs"].append(batch * sizes.steps / seconds)
    bench.notes.append(
        f"{ours.config.run.name}: their batch has {batch} questions; {sizes.steps} steps a repeat, {sizes.warm} before them are "
        f"not counted; {len(ours.dataset.groups)} pictures, {len(dialogues)} questions."
    )
    if HOW_THEIRS not in bench.notes:
        bench.notes.append(HOW_THEIRS)
    return {name: Measured(tuple(values)) for name, values in found.items()}


def _trainer(bench: VqaBench, ours: OurLoop) -> TrainerLoop:
    """The peer, starting from our weights as they are now."""
    bench.peer |= peer_versions()
    return TrainerLoop(
        ours.answering,
        copy.deepcopy(ours.answering.model),
        ours.config.optimizer,
        ours.config.engine.precision,
        bench.folder / "trainer",
    )


def _questions(bench: VqaBench, ours: OurLoop, dialogues: Sequence[Dialogue]) -> Questions:
    return Questions(dialogues, bench.train, ours.answering)


# ------------------------------------------------------------------------------------------------------------------- answers


def answers(bench: VqaBench) -> list[Row]:
    """Waiting questions answered at once and one by one, by both families, in fp32 as they are served."""
    taught = OurLoop.of(bench, bench.config("answers"))
    taught.seconds_per_question(warm=1, steps=bench.sizes.taught)
    vqa = taught.learner.exported()
    name = "VQA model (easy-vqa's)" if bench.sizes.real else "VQA model (tiny)"
    rows = _batched(bench, f"{name}, {bench.sizes.taught + 1} steps old", vqa, None, 5.0)
    torch.manual_seed(0)
    llm = build_mllm(bench.llm_config())
    llm.model.eval()
    name = "multimodal LLM (SmolLM2-135M)" if bench.sizes.real else "multimodal LLM (tiny)"
    tokens = bench.sizes.llm_tokens
    return rows + _batched(bench, f"{name}, up to {tokens} tokens, untaught", llm, tokens, None)


def _batched(
    bench: VqaBench, who: str, answering: Answering, tokens: int | None, bar: float | None
) -> list[Row]:
    sizes = bench.sizes
    groups = group_dialogues(bench.test, sizes.waiting)
    asked = [bench.test[group[number % len(group)]] for number, group in enumerate(groups)]
    pictures = {
        dialogue.name: decoded_pictures(bench.test, dialogue.pictures, answering.image) for dialogue in asked
    }
    together = decoded_pictures(bench.test, [dialogue.pictures[0] for dialogue in asked], answering.image)

    def batched() -> list[str]:
        return [said.text for said in answering.answer(asked, together, max_new_tokens=tokens)]

    def alone() -> list[str]:
        said = [answering.answer([one], pictures[one.name], max_new_tokens=tokens)[0] for one in asked]
        return [each.text for each in said]

    one, other = batched(), alone()  # they warm up too
    differ = sum(a != b for a, b in zip(one, other, strict=True))
    found: dict[Callable[[], list[str]], list[float]] = {batched: [], alone: []}
    for _ in range(sizes.repeats):
        for way, speeds in found.items():
            started = time.perf_counter()
            way()
            speeds.append(len(asked) / (time.perf_counter() - started))
    a, b = (Measured(tuple(speeds)) for speeds in found.values())
    what = f"{who}: {len(asked)} waiting questions"
    same = f"{what}: answers that differ, batched and alone"
    return [
        Row(same, f"{len(set(one))} distinct", f"{len(set(other))} distinct", differ, 0, "lower"),
        Row(
            f"{what}, answered at once; before: one by one",
            a.shown("answers/s", 4),
            b.shown("answers/s", 4),
            a.median / b.median,
            bar,
        ),
    ]


PARTS: dict[str, Callable[[VqaBench], list[Row]]] = {"train": train, "cache": cache, "answers": answers}


@contextmanager
def _process(threads: int | None) -> Iterator[None]:
    """Memory as our runs keep it, for both sides; torch's threads, which are what they were afterwards."""
    keep_freed_memory()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_vqa(arguments: Sequence[str]) -> list[Row]:
    """Parse, measure, append the table; the rows."""
    options = read_options("vqa", __doc__, list(PARTS), arguments)
    sizes = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="fmray-benchmark-") as folder, _process(sizes.threads):
        bench = VqaBench(Path(folder), sizes)
        bench.make()
        return run_parts(PARTS, options, bench)
