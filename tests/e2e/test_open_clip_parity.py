"""fmray beside open_clip 3.3.0, in an environment of its own that is made once under `.parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmray.benchmarks.losses import compare_losses
from fmray.benchmarks.peers import OPEN_CLIP
from fmray.cli import benchmark, door

PARITY = Path(__file__).parent.parent.parent / ".parity"
pytestmark = [pytest.mark.slow, pytest.mark.parity, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def peer() -> Path:
    """The interpreter of open_clip's environment."""
    return OPEN_CLIP.python(PARITY)


def test_losses_and_gradients_are_open_clips_on_one_process_and_two_ranks(peer: Path, tmp_path: Path) -> None:
    worst = compare_losses(peer, tmp_path)
    assert len(worst) == 4
    for case, difference in worst.items():
        assert difference <= 1e-6, case


@pytest.mark.ray
def test_the_whole_benchmark_runs(
    peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(PARITY.parent)
    results = tmp_path / "RESULTS.md"
    assert door(benchmark, ["clip", "--quick", "--results", str(results)]) == 0, capsys.readouterr().err
    table = results.read_text(encoding="utf-8")
    for what in (
        "first loss",
        "identical tensors",
        "training from files",
        "GradCache step",
        "peak memory",
        "Ray Train, 1 worker",
    ):
        assert what in table, what
    first = next(line for line in table.splitlines() if "first loss" in line)
    assert first.endswith("| yes |"), first


def test_an_unknown_part_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert door(benchmark, ["clip", "--parts", "speed"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training" in error
    assert door(benchmark, ["clap"]) == 1
