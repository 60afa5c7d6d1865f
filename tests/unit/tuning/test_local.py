"""Sweeps in one process, on a door whose results are known in closed form: decisions, failures, kills, going on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fmray.errors import CheckpointError, ConfigError, DataError
from fmray.tuning.exploit import adopt_checkpoint
from fmray.tuning.local import run_in_turn
from fmray.tuning.table import best_of, front_of, make_rows, write_table
from fmray.tuning.trials import Change, Trials, one_line
from tests.descent import descents, save, state_of


def run(trials: Trials) -> dict[str, Any]:
    trials.check()
    trials.forgive()
    run_in_turn(trials, lambda: write_table(trials))
    write_table(trials)
    return dict(json.loads(trials.folder.read_text("sweep.json")))


def statuses(trials: Trials) -> list[str]:
    return [trials.record(number).status for number in trials.numbers]


def steps_reported(trials: Trials, number: int) -> list[int]:
    return [line["step"] for line in trials.home(number).metrics() if "train/x" in line]


def without_clock(trials: Trials) -> list[list[dict[str, Any]]]:
    lines = [trials.home(number).metrics() for number in trials.numbers]
    return [[{k: v for k, v in line.items() if k != "time"} for line in some] for some in lines]


def test_every_trial_is_a_run_with_its_keys_and_the_best_is_named(tmp_path: Path) -> None:
    trials = descents(tmp_path)
    table = run(trials)
    assert [state_of(trials, n) for n in trials.numbers] == [
        (8, pytest.approx(0.9**8)),
        (8, pytest.approx(0.5**8)),
        (8, pytest.approx(0.999**8)),
    ]
    assert [row["status"] for row in table["trials"]] == ["finished"] * 3
    assert table["best"] == "trial-00001"
    written = json.loads((tmp_path / "sweep/trial-00001/config.json").read_text())
    assert written["optimizer"]["lr"] == 0.5
    assert written["run"]["name"] == "trial-00001"
    before = without_clock(trials)
    assert run(trials) == table  # again: nothing is left to do
    assert without_clock(trials) == before


def test_a_trial_beyond_a_constraint_is_never_the_best(tmp_path: Path) -> None:
    trials = descents(tmp_path, constraints=[{"metric": "eval/rate", "max": 0.2}])
    table = run(trials)
    assert [row["feasible"] for row in table["trials"]] == [True, False, True]
    assert table["trials"][1]["note"] == "eval/rate 0.5 > 0.2"
    assert table["best"] == "trial-00000"
    nothing = descents(
        tmp_path,
        constraints=[{"metric": "eval/rate", "max": 0.0}],
        run={"name": "none", "storage": str(tmp_path)},
    )
    assert run(nothing)["best"] is None


def test_a_failing_trial_is_one_line_in_the_table_and_tried_again_the_next_time(tmp_path: Path) -> None:
    space = {
        "optimizer.lr": {"kind": "choice", "values": [0.1]},
        "optimizer.fails_at": {"kind": "grid", "values": [None, 3]},
    }
    trials = descents(tmp_path, space=space)
    table = run(trials)
    assert [row["status"] for row in table["trials"]] == ["finished", "failed"]
    assert table["trials"][1]["note"] == "the data ends at step 3"
    assert "DataError" in (tmp_path / "sweep/trial-00001/error.txt").read_text()
    mended = descents(tmp_path, space=space)
    healthy = replace(mended, door=replace(mended.door, work=descend_on))
    assert [row["status"] for row in run(healthy)["trials"]] == ["finished", "finished"]
    assert state_of(healthy, 1) == (8, pytest.approx(0.9**8))


def descend_on(config: Any, context: Any) -> Any:
    from tests.descent import descend

    return descend(config.replace(optimizer=config.optimizer.replace(fails_at=None)), context)


def test_a_metric_that_never_comes_is_said(tmp_path: Path) -> None:
    table = run(descents(tmp_path, metric="eval/beauty"))
    assert {row["note"].split(" was ")[0] for row in table["trials"]} == {"eval/beauty"}
    unknown = descents(
        tmp_path,
        constraints=[{"metric": "eval/kl", "max": 1}],
        run={"name": "kl", "storage": str(tmp_path)},
    )
    assert run(unknown)["trials"][0]["note"].startswith("eval/kl was not reported by step 8")


def test_errors_are_told_in_one_line() -> None:
    assert one_line(DataError("no  picture\nthere")) == "no picture there"
    assert one_line(KeyError()) == "KeyError: KeyError"
    inner = (
        "Training failed:\n[Rank 0]:\nTraceback (most recent call last):\n  File x\nValueError: the cause\n"
    )
    assert one_line(RuntimeError(inner)) == "RuntimeError: ValueError: the cause"
    assert len(one_line(ValueError("x" * 5000))) == 500


# ----------------------------------------------------------------------------------------------------------- schedulers


def test_halving_lets_the_better_go_on(tmp_path: Path) -> None:
    rates = (0.1, 0.5, 0.001, 0.2)
    trials = descents(tmp_path, rates, scheduler={"kind": "asha", "grace": 2, "reduction": 2})
    table = run(trials)
    # at step 2 the better two of four, at step 4 the better one of two
    assert statuses(trials) == ["stopped", "finished", "stopped", "stopped"]
    assert [row["step"] for row in table["trials"]] == [2, 8, 2, 4]
    assert table["best"] == "trial-00001"
    assert steps_reported(trials, 1) == list(range(1, 9))  # paused twice, and nothing done twice
    assert state_of(trials, 1) == (8, pytest.approx(0.5**8))
    assert run(trials) == table


def test_breeding_continues_the_worst_from_the_best_with_other_keys(tmp_path: Path) -> None:
    rule = {"kind": "pbt", "interval": 2, "quantile": 0.34, "resample": 0.0, "factors": (0.5, 1.5)}
    first = (0.001, 0.1, 0.3)
    trials, worst, best = descents(tmp_path, first, scheduler=rule), 0, 2
    table = run(trials)
    change = trials.record(worst).changes[0]
    assert change.step == 2
    assert change.donor == trials.name(best)
    # up to step 2 its own way, from there the donor's weights at the mutated rate
    x_at = {line["step"]: line["train/x"] for line in trials.home(worst).metrics() if "train/x" in line}
    assert x_at[2] == pytest.approx((1 - first[worst]) ** 2)
    assert x_at[3] == pytest.approx((1 - first[best]) ** 2 * (1 - change.keys["optimizer.lr"]))
    written = json.loads((tmp_path / f"sweep/trial-{worst:05d}/config.json").read_text())
    assert written["optimizer"]["lr"] == trials.record(worst).keys["optimizer.lr"] != first[worst]
    assert [row["status"] for row in table["trials"]] == ["finished"] * 3
    assert run(trials) == table


def test_a_population_may_only_change_what_can_change(tmp_path: Path) -> None:
    space = {"width": {"kind": "choice", "values": [1, 2]}}
    trials = descents(tmp_path, space=space, trials=2, scheduler={"kind": "pbt", "interval": 2})
    with pytest.raises(ConfigError, match="'width': pbt changes keys in the middle"):
        trials.check()


@pytest.mark.parametrize("rule", [{"kind": "asha", "grace": 3}, {"kind": "pbt", "interval": 3}])
def test_a_scheduler_needs_evaluations_where_it_decides(tmp_path: Path, rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"base.train.evaluate_every=2: .* divisor of scheduler\.\w+=3"):
        descents(tmp_path, scheduler=rule).check()


def test_a_key_that_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    space = {"optimizer.lrr": {"kind": "grid", "values": [1]}}
    with pytest.raises(ConfigError, match=r"did you mean optimizer\.lr"):
        descents(tmp_path, space=space).check()
    assert not (tmp_path / "sweep").exists()


# ------------------------------------------------------------------------------------------------------ ended, and gone on


@pytest.mark.parametrize("rule", ["none", "asha", "pbt"])
def test_a_sweep_that_was_killed_goes_on_to_the_same_end(tmp_path: Path, rule: str) -> None:
    """The process dies in the middle of the second trial, whatever the scheduler; nothing is lost or learned twice."""
    schedulers: dict[str, dict[str, Any]] = {
        "none": {"kind": "none"},
        "asha": {"kind": "asha", "grace": 2, "reduction": 2},
        "pbt": {"kind": "pbt", "interval": 2, "quantile": 0.34},
    }
    shared = {"scheduler": schedulers[rule]}
    whole = descents(tmp_path / "whole", (0.1, 0.5, 0.3), **shared)
    expected = run(whole)
    killed = descents(tmp_path / "killed", (0.1, 0.5, 0.3), **shared)
    killed.base["optimizer"]["kills_at"] = 5
    for _ in range(4):  # each of the trials that get there is killed once
        process = multiprocessing.get_context("fork").Process(target=run, args=(killed,))
        process.start()
        process.join(60)
        assert process.exitcode in (0, 9)
    assert json.loads(killed.folder.read_text("sweep.json")) == expected
    assert without_clock(killed) == without_clock(whole)
    assert any((tmp_path / f"killed/sweep/trial-0000{n}/killed").exists() for n in range(3))


def test_a_signal_ends_the_trial_under_way_and_the_sweep_goes_on_later(tmp_path: Path) -> None:
    trials = descents(tmp_path)
    trials.base["optimizer"]["seconds"] = 0.05

    def interrupt() -> None:
        while not any(line["step"] >= 3 for line in trials.home(1).metrics()):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    run(trials)
    thread.join()
    assert statuses(trials) == ["finished", "paused", "waiting"]
    assert 3 <= state_of(trials, 1)[0] < 8
    run(trials)
    assert statuses(trials) == ["finished"] * 3
    assert steps_reported(trials, 1) == list(range(1, 9))
    assert state_of(trials, 1) == (8, pytest.approx(0.5**8))


def test_a_stop_file_ends_it_too(tmp_path: Path) -> None:
    trials = descents(tmp_path)
    trials.folder.write_text("please", "stop")
    run(trials)
    assert statuses(trials) == ["waiting"] * 3


# ------------------------------------------------------------------------------------------------------------- exploits


def test_a_checkpoint_is_taken_over_whole_and_the_own_ones_go(tmp_path: Path) -> None:
    trials = descents(tmp_path)
    donor, own = trials.home(0), trials.home(1)
    for step in (2, 4, 6):
        save(donor, step, 0.1 * step, keep=3)
    save(own, 5, 9.0, keep=2)
    assert adopt_checkpoint(donor, own, step=3, before=8)
    assert state_of(trials, 1) == (4, 0.4)  # the first at or after 3, not the newest
    assert [path.name for path in Path(own.path("checkpoints")).iterdir()] == ["step-00000004"]
    assert adopt_checkpoint(donor, own, step=7, before=8)
    assert state_of(trials, 1)[0] == 6
    assert not adopt_checkpoint(donor, own, step=3, before=4)  # the donor has no way to go
    assert state_of(trials, 1)[0] == 6


def test_a_donor_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    trials = descents(tmp_path)
    with pytest.raises(CheckpointError, match="trial-00000: has no finished checkpoint"):
        trials.adopt(1, Change(2, "trial-00000", {"optimizer.lr": 0.1}))


def test_rows_front_and_best_agree(tmp_path: Path) -> None:
    axes = {"x": {"metric": "eval/closeness"}, "y": {"metric": "eval/rate", "mode": "min"}}
    trials = descents(tmp_path, pareto=axes, constraints=[{"metric": "eval/rate", "max": 0.4}])
    run(trials)
    rows = make_rows(trials)
    assert [row.name for row in front_of(rows, trials)] == ["trial-00000", "trial-00002"]
    best = best_of(rows, trials)
    assert best is not None
    assert best.name == "trial-00000"
