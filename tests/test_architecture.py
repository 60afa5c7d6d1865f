"""The walls of the house: who may import whom, and how big things may grow. Read from the syntax trees alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fmray"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")])
MATHS = [
    *(PACKAGE / "objectives").glob("*.py"),
    *(
        PACKAGE / "rlhf" / f"{name}.py"
        for name in ("sums", "kl", "advantages", "credit", "losses", "presets")
    ),
]
"""Pure functions: torch, the standard library, and each other within a room."""
FOUNDATION = {"errors", "types", "config", "manifest", "assets", "assets_build", "assets_language"}

ROOMS_MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "config": {"errors"},
    "manifest": {"errors"},
    "assets": {"errors", "config", "assets_build"},  # the builder is imported when an asset is converted
    "assets_build": {"errors", "assets", "assets_language"},
    "assets_language": {"errors"},
    "runtime": {"errors", "types", "config"},
    "data": {"errors", "types", "config", "assets"},
    "models": {"errors", "types", "config", "assets", "manifest"},
    "objectives": set(),
    "checks": FOUNDATION | {"runtime"},
    "training": FOUNDATION | {"runtime", "data", "models", "objectives", "evaluation"},
    "evaluation": FOUNDATION | {"runtime", "data", "models"},
    "serving": FOUNDATION | {"runtime", "data", "models"},
    "tuning": FOUNDATION | {"runtime"},  # it is handed the doors that it runs
    "rlhf": FOUNDATION | {"runtime", "data", "models", "objectives", "training", "evaluation"},
    "pipeline": FOUNDATION
    | {"runtime", "data", "models", "objectives", "training", "evaluation", "rlhf", "tuning", "serving"},
    "benchmarks": FOUNDATION
    | {"runtime", "data", "models", "objectives", "training", "evaluation", "rlhf", "serving"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported modules of a file, and whether at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module or "", id(node) in top))
    return found


def test_rooms_have_one_way_doors() -> None:
    strays = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room in ("cli", "__init__"):
            continue
        for module, _ in imports(path):
            if module.startswith("fmray."):
                other = module.split(".")[1]
                if other != room and other not in ROOMS_MAY_IMPORT[room]:
                    strays.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not strays, "\n".join(strays)


def test_ray_and_deepspeed_stay_at_their_doors() -> None:
    strays = []
    for path in SOURCES:
        for module, _ in imports(path):
            package = module.split(".")[0]
            ray_door = path.parent.name == "runtime" and path.name.startswith("ray_")
            if (package == "ray" and not ray_door) or (
                package == "deepspeed" and path.name != "deepspeed.py"
            ):
                strays.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not strays, "\n".join(strays)


def test_serving_reaches_ray_through_its_door_alone() -> None:
    for path in (PACKAGE / "serving").glob("*.py"):
        for module, at_top in imports(path):
            if module.startswith("fmray.runtime.ray_"):
                assert not at_top, f"{path.name} imports {module} before it is asked to"


def test_maths_imports_torch_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for path in MATHS:
        own = {f"fmray.{room_of(path)}.{other.stem}" for other in MATHS if room_of(other) == room_of(path)}
        others = {module for module, _ in imports(path) if module.split(".")[0] not in allowed} - own
        assert not others, f"{path.name} imports {others}"


def test_config_and_command_line_do_not_import_torch() -> None:
    code = (
        "import sys, fmray.cli; sys.exit(bool({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_local_mode_imports_without_ray_and_deepspeed(tmp_path: Path) -> None:
    """A fresh interpreter in which both packages cannot be found still imports every room but their doors."""
    code = (
        "import sys\n"
        "sys.modules.update({'ray': None, 'deepspeed': None})\n"
        "import fmray.training.loop, fmray.runtime.launch, fmray.evaluation.embed, fmray.serving.app, fmray.cli\n"
        "from fmray.errors import MissingExtra\n"
        "from fmray.runtime.launch import launch\n"
        "from fmray.config.schema import PretrainConfig, RunConfig, RuntimeConfig\n"
        "run = RunConfig(storage=sys.argv[1])\n"
        "try:\n    launch(print, PretrainConfig(run=run, runtime=RuntimeConfig(kind='ray')))\n"
        "except MissingExtra as error:\n    assert 'fmray[ray]' in str(error)\n"
        "else:\n    sys.exit('ray was found')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small_and_well_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "longer than 400 lines"
    assert not re.search(r"util|common|helper|misc|manager", path.stem), "a name that says nothing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            assert size <= 60, f"{node.name} has {size} lines"
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else getattr(node.type, "id", "")
            assert caught not in ("everything", "Exception", "BaseException"), (
                f"blanket except, line {node.lineno}"
            )
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK|NotImplementedError)\b", text), "unfinished"


def test_environment_is_read_in_one_place() -> None:
    """Variables that other libraries read are set where those are started; ours are read in config/loading.py."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for match in re.finditer(
            r"environ(?:\.get)?[\[(]\s*[\"'](FMRAY_\w+)", path.read_text(encoding="utf-8")
        ):
            assert path.name == "loading.py", f"{path.relative_to(ROOT)} reads {match.group(1)}"


CHAINS = {
    "pairs": [
        ("jobs/pretrain.py", "", "door(pretrain)"),
        ("fmray/cli.py", "pretrain", "training.loop import pretrain as work"),
        ("fmray/training/loop.py", "pretrain", "learn(learner, batch, config, context, step)"),
        ("fmray/training/loop.py", "learn", "learner.engine.backward(loss)"),
        ("fmray/training/engine.py", "backward", "loss.backward()"),
    ],
    "answers": [
        ("jobs/pretrain.py", "", "door(pretrain)"),
        ("fmray/cli.py", "pretrain", "training.answers import train_answers as work"),
        ("fmray/training/answers.py", "train_answers", "learn(learner, batches, config, context, step)"),
        ("fmray/training/answers.py", "learn", "learner.engine.backward("),
        ("fmray/training/engine.py", "backward", "loss.backward()"),
    ],
}
"""What a reader follows from jobs/pretrain.py to loss.backward(), runtime/ (the plumbing) not counted."""


@pytest.mark.parametrize("task", CHAINS)
def test_four_hops_and_four_files_from_job_to_backward(task: str) -> None:
    chain = CHAINS[task]
    for file, function, call in chain:
        text = (ROOT / file).read_text(encoding="utf-8")
        bodies = [
            ast.get_source_segment(text, node) or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        assert any(call in body for body in bodies or [text]), f"{file}:{function} no longer calls {call}"
    assert len(chain) - 1 <= 4
    assert len({file for file, _, _ in chain}) <= 4
