"""`fmray benchmark vqa`: both sides compute the same before they are timed, what is timed is what is said, and the quick run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fmray.benchmarks.vqa import SAME_LOSS, run_vqa
from fmray.benchmarks.vqa_bench import QUICK, VqaBench
from fmray.benchmarks.vqa_ours import OurLoop
from fmray.benchmarks.vqa_trainer import Collator, Questions, TrainerLoop
from fmray.cli import benchmark, door
from fmray.config.loading import CACHE_VARIABLE

pytest.importorskip("accelerate")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VqaBench]:
    """Tiny models and a cache of its own; one thread."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    made = VqaBench(tmp_path, QUICK)
    made.make()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield made
    torch.set_num_threads(before)


def sides(
    bench: VqaBench, precision: str = "fp32", *, frozen: bool = False
) -> tuple[OurLoop, TrainerLoop, Questions]:
    """Ours, theirs from the same weights, and our first batch as their rows."""
    config = bench.config("run", precision=precision, frozen=frozen)
    ours = OurLoop.of(bench, config)
    model = copy.deepcopy(ours.answering.model)
    theirs = TrainerLoop(ours.answering, model, config.optimizer, precision, bench.folder / "trainer")
    return ours, theirs, Questions(ours.first_batch().dialogues, bench.train, ours.answering)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_sides_start_with_the_same_loss_and_gradient(
    bench: VqaBench, precision: str, frozen: bool
) -> None:
    ours, theirs, questions = sides(bench, precision, frozen=frozen)
    loss, norm = theirs.loss(questions)
    mine, my_norm = ours.first_loss()
    assert mine == pytest.approx(loss, rel=SAME_LOSS[precision])
    assert my_norm == pytest.approx(norm, rel=1e-4 if precision == "fp32" else 5e-2)


def test_the_first_loss_tells_other_weights_and_other_questions_apart(bench: VqaBench) -> None:
    ours, theirs, questions = sides(bench)
    loss, _ = theirs.loss(questions)
    fewer = Questions(ours.first_batch().dialogues[:-1], bench.train, ours.answering)
    assert abs(theirs.loss(fewer)[0] / loss - 1) > 10 * SAME_LOSS["fp32"]
    with torch.no_grad():
        theirs.model.vision_projection.weight.mul_(1.1)
    assert abs(theirs.loss(questions)[0] / loss - 1) > 10 * SAME_LOSS["fp32"]


def test_their_loop_trains_a_copy_in_steps_of_the_same_number_of_questions(bench: VqaBench) -> None:
    ours, theirs, questions = sides(bench)
    assert len(questions) == QUICK.batch * QUICK.questions
    before = {name: value.clone() for name, value in theirs.model.state_dict().items()}
    assert theirs.seconds(questions, len(questions) // 2, warm=1, steps=3) > 0  # beyond an epoch
    after = theirs.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    locked = {n for n, p in theirs.model.named_parameters() if not p.requires_grad}
    assert locked == {n for n, _ in theirs.model.named_parameters() if n.startswith("text.")}
    assert locked == {n for n, p in ours.learner.model.named_parameters() if not p.requires_grad}


def test_a_collated_batch_is_padded_to_the_right_row_by_row() -> None:
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    samples = [
        {"pixel_values": pixels, "input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([1, 9])},
        {"pixel_values": pixels + 1, "input_ids": torch.tensor([8]), "labels": torch.tensor([1, 4, 9])},
    ]
    batch = Collator(question_pad=0, answer_pad=9)(samples)
    assert batch["pixel_values"].shape == (2, 3, 2, 2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[1, 9, 9], [1, 4, 9]]
    assert batch["labels"].tolist() == [[1, 9, -100], [1, 4, 9]]


def test_a_warm_cache_spares_the_tower_and_changes_no_loss(bench: VqaBench) -> None:
    config = bench.config("run", precision="fp32", frozen=True)
    cached = OurLoop.of(bench, config, bench.folder / "features")
    plain = OurLoop.of(bench, config.replace(data=config.data.replace(cache_features=False)))
    features = cached.learner.features
    assert features is not None
    assert plain.learner.features is None
    assert features.made == QUICK.pictures
    assert len(list((bench.folder / "features").iterdir())) == QUICK.pictures
    assert cached.first_loss() == pytest.approx(plain.first_loss(), rel=1e-5)

    def never(*_: object) -> None:
        raise AssertionError("the locked tower ran")

    cached.learner.model.vision.register_forward_hook(never)
    assert cached.seconds_per_question(warm=1, steps=2) > 0
    assert (cached.done, features.made) == (4, QUICK.pictures)


@pytest.mark.slow
def test_the_quick_run_and_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    rows = {row.what: row for row in run_vqa(["--quick", "--results", str(tmp_path / "RESULTS.md")])}
    assert torch.get_num_threads() == threads
    same = [row for what, row in rows.items() if "loss of the first batch" in what or "that differ" in what]
    assert [row.met for row in same] == [True] * 6
    assert any(
        int(row.ours.split()[0]) > 1 for row in same if "that differ" in row.what
    )  # else equality says little
    measured = [row for row in rows.values() if row not in same]
    assert [row.bar for row in measured] == [1.3, 3.0, None, None, 5.0, None]
    assert all(row.ratio is not None and row.ratio > 0 for row in measured)
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert "`fmray benchmark vqa --quick`" in text
    assert "accelerate" in text
    assert text.count("requires_grad off") == 1


def test_an_unknown_part_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(benchmark, ["vqa", "--parts", "speed"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "train, cache, answers" in error
    assert door(benchmark, ["vqq"]) == 1
    assert "'vqa'" in capsys.readouterr().err
