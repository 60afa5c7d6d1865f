"""The door's work: which kind a document is, and the checks of that kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fmray.checks.findings import Finding, Report, closest
from fmray.checks.marked import Node, Place, parse
from fmray.errors import ConfigError, require_package

FAMILIES: dict[str, tuple[str, ...]] = {
    "kubernetes": ("apiVersion", "kind", "metadata", "spec"),
    "serve": (
        *("applications", "http_options", "proxy_location", "logging_config", "grpc_options"),
        *("target_capacity", "controller_options", "tracing_config"),
    ),
    "launcher": (
        *(
            "cluster_name",
            "provider",
            "available_node_types",
            "head_node_type",
            "max_workers",
            "auth",
            "docker",
        ),
        *("head_start_ray_commands", "worker_start_ray_commands", "setup_commands", "file_mounts"),
        *("initialization_commands", "idle_timeout_minutes", "upscaling_speed"),
    ),
}
"""Top-level keys by which a document is recognised."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a command line asks for: `--json --gpus 4 a.yaml b.yaml`."""

    files: tuple[str, ...]
    as_json: bool = False
    gpus: float | None = None


USAGE = """usage: fmray check [--json] [--gpus N] FILE…

Checks Serve configs, KubeRay manifests and cluster-launcher files without a cluster, strictly: a key that nobody reads is an
error. One finding per line: FILE:LINE:COLUMN: error: KEY: what is wrong; the cure. Exit status 1 where there is an error.

  --json     findings as one JSON list
  --gpus N   GPUs of the cluster that Serve configs are for; a RayService says it itself"""


def read_order(arguments: Sequence[str]) -> Order:
    """Raises ConfigError for an option that the door does not have, and where no file is named."""
    words, named, as_json, gpus = list(arguments), [], False, None
    while words:
        word = words.pop(0)
        flag, _, inline = word.partition("=")
        if word == "--json":
            as_json = True
        elif flag == "--gpus":
            text = inline or (words.pop(0) if words else "")
            try:
                gpus = float(text)
            except ValueError:
                raise ConfigError("--gpus", text, "write the number of GPUs, such as --gpus 4") from None
        elif word.startswith("-"):
            raise ConfigError(word, "", "unknown option; there are --json and --gpus N")
        else:
            named.append(word)
    if not named:
        raise ConfigError("check", "", "name at least one file: fmray check serve_configs/all.yaml")
    return Order(tuple(named), as_json, gpus)


def check_files(order: Order, doors: Sequence[str]) -> list[Finding]:
    """All findings, file by file; `doors`: what `fmray NAME` opens.

    Raises MissingExtra without Ray, ConfigError for a file that cannot be read.
    """
    require_package("ray", "ray", "fmray check")
    texts = {name: _read(name) for name in order.files}
    from fmray.checks.capacity import Cluster, NodeGroup
    from fmray.checks.kuberay import ManifestCheck
    from fmray.checks.launcher import LauncherCheck
    from fmray.checks.serve import ServeCheck

    serve = ServeCheck()
    manifests, launcher = ManifestCheck(serve, doors), LauncherCheck()
    size = None if order.gpus is None else Cluster((NodeGroup("--gpus", 1, gpus=order.gpus),))
    found: list[Finding] = []
    for name, text in texts.items():
        report = Report(name)
        parsed = parse(text)
        report.slips(parsed.slips)
        if not parsed.documents and not parsed.slips:
            report.error(Place(1, 1), "", "holds nothing", "write a document")
        for document in parsed.documents:
            family = family_of(document)
            if family == "serve":
                serve.check(document, report, cluster=size)
            elif family == "kubernetes":
                manifests.check(document, report)
            elif family == "launcher":
                launcher.check(document, report)
            else:
                problem = (
                    "is no Serve config (applications), manifest (apiVersion, kind) or cluster (cluster_name)"
                )
                report.error(document, "", problem, "give it the keys of one of them")
        found += sorted(report.findings, key=lambda finding: (finding.line, finding.column))
    return found


def family_of(document: Node) -> str | None:
    """The family most of whose top-level keys a document has, slips of them counting half; None: of none."""
    keys = [entry.key for entry in document.entries]
    scores = {
        family: sum(1.0 if key in names else 0.5 if closest(key, names, 0.8) else 0.0 for key in keys)
        for family, names in FAMILIES.items()
    }
    best = max(scores, key=lambda family: scores[family])
    return best if scores[best] > 0 else None


def _read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise ConfigError("check", name, "no such file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("check", name, f"cannot be read: {error}") from None
