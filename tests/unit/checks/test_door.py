"""`fmray check` at the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fmray.checks.files import read_order
from fmray.cli import main
from fmray.errors import ConfigError
from tests.unit.checks.mutants import ROOT, SHIPPED


def test_clean_files_end_with_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *map(str, SHIPPED)]) == 0
    assert capsys.readouterr().out == f"{len(SHIPPED)} files checked, nothing found\n"


def test_a_finding_is_a_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    text = (ROOT / "cluster/raycluster.yaml").read_text(encoding="utf-8")
    file.write_text(text.replace("minReplicas: 0", "minReplica: 0", 1))
    line = text[: text.index("minReplicas: 0")].count("\n") + 1
    assert main(["check", str(file)]) == 1
    said = capsys.readouterr().out
    assert said == (
        f"{file}:{line}:7: error: spec.workerGroupSpecs[0].minReplica: unknown key; did you mean minReplicas?\n"
    )
    assert main(["check", "--json", str(file)]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["line"], finding["column"], finding["severity"]) == (line, 7, "error")


def test_a_clusters_gpus_can_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(ROOT / "serve_configs/clip.yaml")
    assert main(["check", "--gpus", "2", file]) == 0
    assert main(["check", "--gpus=1", file]) == 1
    assert "the cluster holds 2 at its largest" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--fast", "a.yaml"], ["--gpus", "many", "a.yaml"]])
def test_a_wrong_command_line_is_one_error(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        read_order(arguments)


def test_without_ray_the_extra_is_named() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "import fmray.errors\n"
        "fmray.errors.find_spec = lambda name: None if name == 'ray' else find(name)\n"
        "from fmray.cli import main\n"
        "sys.exit(main(['check', sys.argv[1]]))\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "serve_configs/clip.yaml")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: fmray check needs ray, which is not installed: pip install 'fmray[ray]'\n"
