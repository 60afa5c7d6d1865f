"""Every reporter for real: files, TensorBoard's reader, wandb offline, MLflow's store, a Prometheus scrape over HTTP."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fmray.config.loading import dump_json
from fmray.config.schema import ReportConfig
from fmray.errors import ResourceError
from fmray.runtime.metrics import (
    METRICS,
    FileReporter,
    PrometheusReporter,
    drop_reports_after,
    family_of,
    make_reporters,
    prometheus_name,
)
from fmray.runtime.ports import bind, free_port
from fmray.runtime.run_folder import RunFolder
from fmray.training.schedule import due

STEP = {"train/loss": 1.5, "train/images_per_second": 10.0}
EVALUATION = {"eval/ko/image_to_text/r5": 0.25}


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    """A local folder and an fsspec URL."""
    return RunFolder(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def test_file_reports_append_survive_and_are_cut_at_a_step(folder: RunFolder) -> None:
    for step in (1, 2):
        FileReporter(folder)(step, STEP)
    FileReporter(folder)(2, EVALUATION)
    FileReporter(folder)(3, STEP)
    assert [line["step"] for line in folder.metrics()] == [1, 2, 2, 3]
    drop_reports_after(folder, 2)
    assert [line["step"] for line in folder.metrics()] == [1, 2, 2]
    assert folder.metrics()[1]["train/loss"] == 1.5


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reporters = make_reporters(ReportConfig(tensorboard=True), RunFolder(str(tmp_path / "run")), "run")
    for tell in reporters:
        tell(4, STEP)
    events = reading.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(4, 1.5)]


@pytest.mark.slow
def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_text("{}", "config.json")
    for tell in make_reporters(ReportConfig(wandb="offline"), folder, "my-run"):
        tell(1, STEP)
    wandb.finish()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-my-run.wandb"))


@pytest.mark.slow
def test_mlflow_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # a database store needs more than the skinny package
    mlflow = pytest.importorskip("mlflow")
    uri = f"file:{tmp_path}/mlruns"
    for tell in make_reporters(ReportConfig(mlflow=uri), RunFolder(str(tmp_path / "run")), "my-run"):
        tell(3, {**STEP, **EVALUATION})
    mlflow.end_run()
    runs = mlflow.search_runs(experiment_names=["fmray"], output_format="list")
    assert runs[0].data.metrics["train/loss"] == 1.5
    assert runs[0].data.metrics["eval/ko/image_to_text/r5"] == 0.25


def test_prometheus_serves_the_table_over_http() -> None:
    port = free_port()
    tell = PrometheusReporter(port)
    tell(7, STEP | EVALUATION)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {prometheus_name(name) for name in METRICS} <= families.keys()
    assert families["fmray_train_loss"].samples[0].value == 1.5
    assert families["fmray_step"].samples[0].value == 7
    sample = families["fmray_eval"].samples[0]
    assert (sample.labels, sample.value) == ({"metric": "ko/image_to_text/r5"}, 0.25)
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ResourceError, match="take another"):
            PrometheusReporter(taken.getsockname()[1])


def test_the_loops_report_the_names_of_the_table(tmp_path: Path) -> None:
    """Read from real runs' files: of pretraining, a reward model, PPO; together they are all names that there are but one."""
    from fmray.cli import door, pretrain, reward, rlhf
    from tests.opinions import write_opinion_config
    from tests.pictures import write_config
    from tests.stories import story_run, tiny_t5

    story = tmp_path / "story.json"
    story.write_text(dump_json(story_run(tmp_path, tiny_t5(tmp_path / "t5"))), encoding="utf-8")
    configs = {
        pretrain: write_config(tmp_path, "pairs", train__steps=2),
        reward: write_opinion_config(tmp_path, "opinions", "pairs", train__steps=2),
        rlhf: story,
    }
    for work, config in configs.items():
        assert door(work, ["--config", str(config)]) == 0
    files = [tmp_path / "runs" / name / "metrics.jsonl" for name in ("pairs", "opinions", "story")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    names = {name for line in lines for name in line if family_of(name) is None} - {"step", "time"}
    assert names == set(METRICS) - {"train/reply_loss"}  # of models that answer with pictures: test_replies
    assert due(4, 2)
    assert not due(4, None)
