"""KubeRay manifests: the CRD read strictly, the operator's own rules, the Serve config inside, what the cluster can hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fmray.checks.cluster_rules import CLUSTER_RULES, cluster_size
from fmray.checks.commands import check_entrypoint
from fmray.checks.findings import Report, closest, joined
from fmray.checks.marked import Node, parse
from fmray.checks.pods import check_pod
from fmray.checks.schemas import StrictSchema
from fmray.checks.serve import ServeCheck
from fmray.checks.serve_schema import runtime_env

KINDS = ("RayCluster", "RayJob", "RayService")
API = "ray.io/v1"
CLUSTER_AT = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""The operator makes names of pods and services from it, which Kubernetes caps at 63."""
RENAMED = {
    "serveConfig": "serveConfigV2",
    "runtimeEnv": "runtimeEnvYAML",
    "rayClusterTemplate": "rayClusterSpec",
    "workersToDelete": "scaleStrategy",
}


def kuberay_schema() -> dict[str, Any]:
    """The trimmed CRDs that ship with fmray."""
    schema: dict[str, Any] = json.loads(files("fmray.checks").joinpath("kuberay.json").read_text("utf-8"))
    return schema


@dataclass
class ManifestCheck:
    """The check of Kubernetes documents; `doors`: the doors that `fmray NAME` opens."""

    serve: ServeCheck
    doors: Sequence[str]
    schema: dict[str, Any] = field(default_factory=kuberay_schema)

    def check(self, node: Node, report: Report) -> None:
        """Everything that is wrong with one document; of other kinds than Ray's only that it has its head."""
        kind = self._kind(node, report)
        if kind is None:
            return
        strict = StrictSchema({**self.schema, **self.schema["$defs"][kind]}, RENAMED)
        strict.check(node, report)
        _name(node, kind, report)
        keys = CLUSTER_AT[kind]
        cluster, path = node.get(*keys), ".".join(keys)
        if cluster is not None and cluster.kind == "mapping":
            for rule in CLUSTER_RULES:
                rule(cluster, path, node, report)
            for at, template in _templates(node):
                check_pod(template, at, report)
        if kind == "RayService":
            self._service(node, cluster, report)
        if kind == "RayJob":
            self._job(node, report)

    def _kind(self, node: Node, report: Report) -> str | None:
        """The kind of a Ray document, guessed where its name is misspelt; None: not one of Ray's."""
        kind, api = node.text("kind"), node.text("apiVersion") or ""
        if kind in KINDS:
            return kind
        if kind is not None and not api.startswith("ray.io") and closest(kind, KINDS, 0.85) is None:
            for key in ("apiVersion", "metadata"):
                if node.get(key) is None:
                    report.error(node, key, "is required, and missing", f"write {key}: …")
            return None
        spec = {entry.key for entry in (node.get("spec") or node).entries}
        scores = {
            name: len(
                spec
                & {
                    *self.schema["$defs"][name]["properties"]["spec"].get(
                        "properties", ("headGroupSpec", "workerGroupSpecs")
                    )
                }
            )
            for name in KINDS
        }
        guess = closest(kind or "", KINDS) or max(scores, key=lambda name: scores[name])
        return guess

    def _service(self, node: Node, cluster: Node | None, report: Report) -> None:
        text, path = node.get("spec", "serveConfigV2"), "spec.serveConfigV2"
        _upgrade(node, report)
        if text is None or text.kind != "string":
            return
        parsed = parse(text.value, text.inner)
        report.slips(parsed.slips, path)
        size = cluster_size(cluster) if cluster is not None else None
        for document in parsed.documents[:1]:
            self.serve.check(document, report, path, size)
            _serve_port(document, cluster, report)
        if len(parsed.documents) > 1:
            report.error(parsed.documents[1], path, "holds a second document", "write one Serve config")

    def _job(self, node: Node, report: Report) -> None:
        spec = node.get("spec")
        if spec is None or spec.kind != "mapping":
            return
        _job_rules(spec, report)
        command, env = spec.get("entrypoint"), spec.get("runtimeEnvYAML")
        if command is not None and command.kind == "string" and command.value:
            wrong = check_entrypoint(command.value, self.doors)
            if wrong:
                report.error(command, "spec.entrypoint", wrong.problem, wrong.cure)
        if env is not None and env.kind == "string":
            parsed = parse(env.value, env.inner)
            report.slips(parsed.slips, "spec.runtimeEnvYAML")
            for document in parsed.documents:
                StrictSchema(runtime_env(remote=False)).check(document, report, "spec.runtimeEnvYAML")
        resources = spec.get("entrypointResources")
        if resources is not None and resources.kind == "string":
            for document in parse(resources.value, resources.inner).documents:
                if document.kind != "mapping":
                    says = "write a mapping in quotes: '{\"accelerator\": 1}'"
                    report.error(resources, "spec.entrypointResources", "holds no mapping", says)


def _name(node: Node, kind: str, report: Report) -> None:
    name = node.get("metadata", "name")
    if name is None or name.kind != "string" or not name.value:
        return
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name.value):
        cure = "must be lower-case letters, digits and dashes, beginning with a letter"
        report.error(name, "metadata.name", f"is {name.value!r}", cure)
    elif len(name.value) > LONGEST_NAME[kind]:
        problem = f"has {len(name.value)} characters"
        report.error(name, "metadata.name", problem, f"at most {LONGEST_NAME[kind]} are allowed")
    timeout = node.get("metadata", "annotations", "ray.io/initializing-timeout")
    if timeout is not None and not re.fullmatch(r"(\d+(\.\d+)?(h|m|s|ms))+|[1-9]\d*", str(timeout.value)):
        path = joined("metadata.annotations", "ray.io/initializing-timeout")
        report.error(timeout, path, f"is {timeout.value!r}", 'write a duration, such as "30m"')


def _templates(node: Node) -> Iterator[tuple[str, Node]]:
    """The pod templates anywhere in a document."""
    waiting = [("", node)]
    while waiting:
        path, here = waiting.pop(0)
        for entry in here.entries:
            inside = joined(path, entry.key)
            if entry.key in ("template", "submitterPodTemplate") and entry.node.get("spec") is not None:
                yield inside, entry.node
            waiting.append((inside, entry.node))
        waiting += [(f"{path}[{number}]", item) for number, item in enumerate(here.items)]


def _upgrade(node: Node, report: Report) -> None:
    strategy, path = node.get("spec", "upgradeStrategy"), "spec.upgradeStrategy"
    if strategy is None or strategy.text("type") != "NewClusterWithIncrementalUpgrade":
        return
    options = strategy.get("clusterUpgradeOptions")
    if options is None:
        cure = "write stepSizePercent, intervalSeconds and gatewayClassName"
        report.error(strategy, f"{path}.clusterUpgradeOptions", "is required, and missing", cure)
        return
    step, surge = options.number("stepSizePercent"), options.number("maxSurgePercent")
    if step is not None and step > (100 if surge is None else surge):
        at = options.get("stepSizePercent") or options
        problem = f"is {step:g}, more than maxSurgePercent {surge:g}"
        report.error(
            at, f"{path}.clusterUpgradeOptions.stepSizePercent", problem, "lower it, or raise the other"
        )


def _serve_port(document: Node, cluster: Node | None, report: Report) -> None:
    """The head's port named `serve` is where the Kubernetes service sends requests."""
    given = document.get("http_options", "port")
    port = given.value if given is not None else 8000
    containers = cluster.list_of("headGroupSpec", "template", "spec", "containers") if cluster else ()
    for number, one in enumerate(containers[0].list_of("ports") if containers else ()):
        at = one.get("containerPort")
        if one.text("name") == "serve" and at is not None and at.value != port:
            path = f"spec.rayClusterConfig.headGroupSpec.template.spec.containers[0].ports[{number}].containerPort"
            report.error(
                at,
                path,
                f"is {at.value}, Serve listens on {port}",
                f"write {port}, or change http_options.port",
            )


def _job_rules(spec: Node, report: Report) -> None:
    """The operator's rules for jobs: ValidateRayJobSpec of KubeRay v1.7."""
    mode, retries = spec.text("submissionMode"), spec.number("backoffLimit") or 0
    selector, shutdown = spec.get("clusterSelector"), spec.get("shutdownAfterJobFinishes")
    ends = shutdown is not None and shutdown.value is True

    def refuse(key: str, problem: str, cure: str) -> None:
        report.error(spec.get(key) or spec, f"spec.{key}", problem, cure)

    if (spec.number("ttlSecondsAfterFinished") or 0) > 0 and not ends:
        refuse(
            "ttlSecondsAfterFinished",
            "needs shutdownAfterJobFinishes: true",
            "write that too, or remove this",
        )
    suspend = spec.get("suspend")
    if suspend is not None and suspend.value is True and not ends:
        refuse("suspend", "needs shutdownAfterJobFinishes: true", "write that too, or remove this")
    if spec.get("rayClusterSpec") is None and selector is None:
        refuse("rayClusterSpec", "neither it nor clusterSelector is written", "write one of them")
    if selector is not None and retries > 0:
        refuse("backoffLimit", "cannot stand beside clusterSelector", "remove it: retries make new clusters")
    if mode == "InteractiveMode" and retries > 0:
        refuse("backoffLimit", "cannot be retried in InteractiveMode", "write 0")
    if mode == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec.get(key) is not None:
                refuse(key, "cannot stand beside submissionMode: SidecarMode", "remove it")
    keys = [entry.key for entry in spec.entries]
    if mode != "InteractiveMode" and "entrypoint" not in keys and closest("entrypoint", keys, 0.8) is None:
        refuse("entrypoint", "is required, and missing", "write the command of the job")
    if spec.list_of("deletionStrategy", "deletionRules") and ends:
        refuse("deletionStrategy", "cannot stand beside shutdownAfterJobFinishes", "keep one of them")
