"""Single mistakes and the line that each is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checks.conftest import Check
from tests.unit.checks.mutants import ROOT

CLIP = (ROOT / "serve_configs/clip.yaml").read_text(encoding="utf-8")
ALL = (ROOT / "serve_configs/all.yaml").read_text(encoding="utf-8")
SERVICE = (ROOT / "cluster/rayservice.yaml").read_text(encoding="utf-8")
JOB = (ROOT / "cluster/rayjob.yaml").read_text(encoding="utf-8")
LAUNCHER = (ROOT / "cluster/launcher.yaml").read_text(encoding="utf-8")
DEPLOYMENT = "applications[0].deployments[0]"

SERVE_MISTAKES = [
    (
        "max_ongoing_requests: 1024",
        "max_concurrent_queries: 128",
        f"{DEPLOYMENT}.max_concurrent_queries: unknown key: an old name, silently ignored; write max_ongoing_requests",
    ),
    (
        "          look_back_period_s: 30",
        "          max_ongoing_requests: 30",
        f"{DEPLOYMENT}.autoscaling_config.max_ongoing_requests: max_ongoing_requests does not belong here; "
        f"it belongs one level up, into {DEPLOYMENT}",
    ),
    (
        "        max_queued_requests: 512",
        "        num_gpus: 1",
        f"{DEPLOYMENT}.num_gpus: num_gpus does not belong here; it belongs into ray_actor_options",
    ),
    (
        "min_replicas: 1",
        "min_replicas: 9",
        f"{DEPLOYMENT}.autoscaling_config.min_replicas: min_replicas 9 exceeds max_replicas 4; "
        "write max_replicas: 9 or more, or lower min_replicas",
    ),
    (
        "max_ongoing_requests: 1024",
        "max_ongoing_requests: 100",
        f"{DEPLOYMENT}.max_ongoing_requests: is 100, less than two batches of 64; "
        "write 128, twice batch.max_items, or lower batch.max_items",
    ),
    (
        "deploy:app",
        "deploy:ap",
        "applications[0].import_path: module fmray.serving.deploy has no attribute 'ap'; "
        "did you mean fmray.serving.deploy:app?",
    ),
    (
        "- name: Model",
        "- name: Modle",
        f"{DEPLOYMENT}.name: is 'Modle', which this application does not have; did you mean Model?",
    ),
    (
        "max_items: 64",
        "max_item: 64",
        f"{DEPLOYMENT}.user_config.batch.max_item: unknown key; did you mean max_items?",
    ),
    (
        "          checkpoint: /models/clip\n          batch",
        "          model_id: x\n          batch",
        f"{DEPLOYMENT}.user_config.model_id: model_id does not belong here; "
        "it belongs into args: a replica cannot change it",
    ),
    (
        "      model_id: fmray-clip",
        "      port: 0",
        "applications[0].args.port: is 0; must be at least 1",
    ),
    (
        "max_replicas: 4",
        'max_replicas: "4"',
        f'{DEPLOYMENT}.autoscaling_config.max_replicas: is the string "4", where a whole number belongs; '
        "write 4 without quotes",
    ),
]


@pytest.mark.parametrize(("old", "new", "line"), SERVE_MISTAKES, ids=lambda text: str(text).strip()[:24])
def test_serve_mistakes(old: str, new: str, line: str, check: Check) -> None:
    assert old in CLIP
    text = CLIP.replace(old, new, 1)
    found = check(text)
    assert [f"{finding.key}: {finding.problem}; {finding.cure}" for finding in found] == [line]
    assert found[0].line == CLIP[: CLIP.index(old)].count("\n") + 1 + (len(old) - len(old.lstrip("\n")))


def test_a_local_working_dir_is_refused(check: Check) -> None:
    text = CLIP.replace("    args:", "    runtime_env: {working_dir: .}\n    args:", 1)
    (finding,) = check(text)
    assert finding.key == "applications[0].runtime_env.working_dir"
    assert "Serve takes only addresses here" in finding.cure


def test_fixed_replicas_beside_autoscaling(check: Check) -> None:
    (finding,) = check(CLIP.replace("        max_queued_requests: 512", "        num_replicas: 2", 1))
    assert (finding.problem, finding.line) == ("stands beside autoscaling_config", 27)


def test_two_applications_share_nothing(check: Check) -> None:
    found = check(ALL.replace("/vqa\n    import", "/clip\n    import").replace("name: vqa", "name: clip"))
    assert [finding.problem for finding in found] == [
        "is 'clip', as applications[0].name is",
        "is '/clip', as applications[0].route_prefix is",
    ]


def test_the_embedded_config_has_lines_of_the_outer_file(check: Check) -> None:
    line = next(number for number, text in enumerate(SERVICE.split("\n"), 1) if "min_replicas: 1" in text)
    (finding,) = check(SERVICE.replace("min_replicas: 1", "min_replica: 1", 1))
    assert str(finding) == (
        f"x.yaml:{line}:15: error: spec.serveConfigV2.applications[0].deployments[0].autoscaling_config.min_replica: "
        "unknown key; did you mean min_replicas?"
    )


def test_more_gpus_than_the_cluster_can_have(check: Check) -> None:
    (finding,) = check(SERVICE.replace("max_replicas: 4", "max_replicas: 9", 1))
    assert finding.problem == "asks for 9 replicas of 3 CPUs and 0.5 GPUs, the cluster holds 8 at its largest"
    found = check(SERVICE.replace("num_gpus: 0.5", "num_gpus: 2", 1))
    assert [finding.problem for finding in found] == [
        "no node can hold one replica, which asks for 3 CPUs and 2 GPUs: the largest has 8 CPUs and 1 GPUs"
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('rayVersion: "2.60.0"', 'rayVersion: "2.51.0"', "has Ray 2.60.0"),
        ("dashboard-host: 0.0.0.0", "labels: a=b", "is refused by the operator"),
        ("minReplicas: 1", "minReplicas: 5", "is 5, more than maxReplicas 4"),
        ("{name: models, mountPath", "{name: model, mountPath", "is 'model', which is no volume of this pod"),
        ("containerPort: 8000", "containerPort: 8001", "is 8001, Serve listens on 8000"),
        ('requests: {cpu: "8"', 'requests: {cpu: "9"', "is 9, more than the limit 8"),
        ("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false", "there is no autoscaler"),
        (
            "      mode: token\n",
            "      mode: disabled\n",
            "opens the dashboard to the network without a token",
        ),
    ],
)
def test_operator_rules(old: str, new: str, problem: str, check: Check) -> None:
    assert old in SERVICE
    assert any(problem in finding.problem for finding in check(SERVICE.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("jobs.pretrain", "jobs.pretrian", "jobs has no module 'pretrian'; did you mean jobs.pretrain?"),
        ("python -m jobs.pretrain", "fmray pretran", "fmray has no door 'pretran'; did you mean pretrain?"),
        ("clip_tiny", "clip_tin", "unknown recipe; did you mean clip_tiny?"),
        ("runtime.workers=2", "runtime.worker=2", "did you mean runtime.workers?"),
        ("run.name=clip", "run.name='clip", "is no shell command: No closing quotation"),
    ],
)
def test_entry_points(old: str, new: str, words: str, check: Check) -> None:
    found = check(JOB.replace(old, new, 1))
    assert [finding.key for finding in found] == ["spec.entrypoint"]
    assert words in f"{found[0].problem}; {found[0].cure}"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("type: aws", "type: asw", "did you mean aws?"),
        ("region:", "regoin:", "did you mean region?"),
        ("head_node_type: head", "head_node_type: haed", "did you mean head?"),
        ("InstanceType: g6", "InstanceTyp: g6", "did you mean InstanceType?"),
        ("max_workers: 8", "max_workers: 7", "more than the cluster's max_workers 7"),
        (" --autoscaling-config=~/ray_bootstrap_config.yaml", "", "add --autoscaling-config="),
    ],
)
def test_launcher_files(old: str, new: str, words: str, check: Check) -> None:
    assert any(words in str(finding) for finding in check(LAUNCHER.replace(old, new, 1)))


def test_a_key_twice_and_text_that_is_no_yaml(check: Check) -> None:
    (finding,) = check(CLIP.replace("  port: 8000", "  port: 8000\n  port: 9000"))
    assert finding.problem == "stands twice in the same mapping (line 5 too): the later one silently wins"
    (finding,) = check("a: [1, 2\nb: 3")
    assert finding.problem.startswith("is not YAML")


def test_deployment_names_of_an_application_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    (tmp_path / "shop.py").write_text(
        "from ray import serve\nraise SystemExit('imported')\n"
        "@serve.deployment(name='Till')\nclass Desk:\n    pass\napp = Desk.bind()\n"
    )
    monkeypatch.chdir(tmp_path)
    text = "applications:\n  - {name: shop, import_path: 'shop:app', deployments: [{name: Tell}]}\n"
    (finding,) = check(text)
    assert finding.cure == "did you mean Till?"
