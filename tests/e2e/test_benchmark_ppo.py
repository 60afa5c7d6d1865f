"""`fmray benchmark ppo --quick`: every part end to end on tiny models, and what it checks before it compares speeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmray.benchmarks.ppo_pools import greedy_schedule
from fmray.cli import benchmark, door

PARITY = Path(__file__).parent.parent.parent / ".parity"
slow = pytest.mark.slow


def rows_of(part: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """The part's table: what, and the other cells."""
    results = folder / "RESULTS.md"
    assert door(benchmark, ["ppo", "--quick", "--parts", part, "--results", str(results)]) == 0, (
        capsys.readouterr().err
    )
    text = results.read_text(encoding="utf-8")
    assert f"`fmray benchmark ppo --quick --parts {part}`" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what: rest for what, *rest in cells}


def row(rows: dict[str, list[str]], words: str) -> list[str]:
    """The one row that begins with these words: ours, theirs, ratio, bar, met."""
    found = [rest for what, rest in rows.items() if what.startswith(words)]
    assert len(found) == 1, (words, list(rows))
    return found[0]


@slow
@pytest.mark.parity
@pytest.mark.timeout(900)
def test_both_sides_read_and_answer_the_same_prompts_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PARITY.parent)
    rows = rows_of("trl", tmp_path, capsys)
    assert row(rows, "prompts that the peer's tokenizer reads otherwise")[2:] == ["0", "≤ 0", "yes"]
    ours, theirs, *rest = row(rows, "greedy answers to the same prompts")
    assert ours == theirs
    assert rest == ["0", "≤ 0", "yes"]
    for precision in ("fp32", "bf16"):
        ours, theirs, ratio, *_ = row(rows, f"PPO iteration in {precision}")
        assert "samples/s" in ours
        assert "samples/s" in theirs
        assert float(ratio) > 0


@slow
def test_decoding_beside_generate_for_both_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("decode", tmp_path, capsys)
    for family in ("encoder-decoder", "decoder-only"):
        assert row(rows, f"decoding, {family} (tiny), fp32, batch 8, 6 tokens each")[3] == "≥ 1.5"


@slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_loop_and_its_bare_calls_meet_the_same_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("overhead", tmp_path, capsys)
    assert row(rows, "response tokens of the loop's iterations")[2:] == ["0", "≤ 0.5", "yes"]
    told = [rest for what, rest in rows.items() if what.startswith("iteration / its own generate")]
    assert [rest[3] for rest in told] == ["≤ 1.15", "≤ 1.25"]
    assert all(float(rest[2]) > 0 for rest in told)


@slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_dispatch_and_publishing_on_ray(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dispatched = row(rows_of("dispatch", tmp_path / "dispatch", capsys), "overhead outside the roles")
    assert float(dispatched[2]) >= 0
    assert dispatched[3] == "≤ 1"
    rows = rows_of("publish", tmp_path / "publish", capsys)
    assert len([what for what in rows if what.startswith("publishing")]) == 2
    assert all(0 < float(rest[2]) < 10 for what, rest in rows.items() if what.startswith("publishing"))


def test_the_ideal_schedule_gives_each_request_to_the_first_free_replica() -> None:
    assert greedy_schedule([1.0, 1.0, 1.0], 2) == 2.0
    assert greedy_schedule([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert greedy_schedule([1.0, 3.0, 1.0, 2.0], 2) == 4.0  # 1 + 1 + 2 beside 3


def test_an_unknown_part_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(benchmark, ["ppo", "--parts", "trl,speed"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "speed" in error
    assert "dispatch" in error
