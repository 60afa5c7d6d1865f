"""Cluster-launcher files (`ray up FILE`): Ray's own schema read strictly, and what it lets pass but cannot start."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fmray.checks.cluster_rules import image_version
from fmray.checks.findings import Report, closest, did_you_mean, joined, shown
from fmray.checks.marked import Node
from fmray.checks.schemas import StrictSchema

RENAMED = {
    "head_node": "head_node_type",
    "worker_nodes": "available_node_types",
    "min_workers": "available_node_types",
    "initial_workers": "available_node_types",
    "autoscaling_mode": "upscaling_speed",
    "target_utilization_fraction": "upscaling_speed",
}


def _tightened() -> dict[str, Any]:
    from fmray.runtime.ray_schemas import launcher_schema

    schema = launcher_schema()
    facts = json.loads(files("fmray.checks").joinpath("launcher.json").read_text("utf-8"))
    schema["x-providers"] = facts["providers"]
    fields = schema["properties"]
    fields["provider"]["properties"] |= facts["provider_types"]
    for key in ("rsync_exclude", "rsync_filter", "cluster_synced_files"):
        fields[key] = {"type": "array", "items": {"type": "string"}}
    fields["file_mounts"] = {"type": "object", "additionalProperties": {"type": "string"}}
    for key in ("run_options", "head_run_options", "worker_run_options"):
        fields["docker"]["properties"][key] = {"type": "array", "items": {"type": "string"}}
    nodes = fields["available_node_types"]
    (node,) = nodes.pop("patternProperties").values()
    resources = next(iter(node["properties"]["resources"].pop("patternProperties").values()))
    node["properties"]["resources"] |= {
        "additionalProperties": resources,
        "x-known": ["CPU", "GPU", "TPU", "NPU", "HPU", "memory", "object_store_memory", "neuron_cores"],
        "x-guarded": True,
    }
    labels = node["properties"]["labels"]
    labels.pop("patternProperties", None)
    labels["additionalProperties"] = {"type": "string"}
    for key in ("min_workers", "max_workers"):
        node["properties"][key] = {"type": "integer", "minimum": 0}
    idle = node["properties"]["idle_timeout_s"]
    node["properties"]["idle_timeout_s"] = {"anyOf": [{**idle, "minimum": 0}, {"type": "null"}]}
    nodes["additionalProperties"] = node
    fields["auth"].pop("allOf", None)
    fields["upscaling_speed"] = {"type": "number", "exclusiveMinimum": 0}
    schema["x-node-config"] = facts["node_config"]
    return schema


@dataclass
class LauncherCheck:
    """The check of cluster-launcher files."""

    schema: dict[str, Any] = field(default_factory=_tightened)

    def check(self, node: Node, report: Report) -> None:
        """Everything that is wrong with one file, as far as it can be known without the cloud."""
        before = report.mark()
        StrictSchema(self._of_provider(node.text("provider", "type")), RENAMED).check(node, report)
        self._provider(node, report)
        _node_types(node, report)
        _commands(node, report)
        if report.mark() == before:
            self._verdict(node, report)

    def _provider(self, node: Node, report: Report) -> None:
        provider = node.get("provider")
        if provider is None or provider.kind != "mapping":
            return
        kind, providers = provider.get("type"), self.schema["x-providers"]
        if kind is None or kind.kind != "string":
            return
        if kind.value not in providers:
            report.error(
                kind, "provider.type", f"is {shown(kind)}", did_you_mean(kind.value, list(providers))
            )
            return
        rules = providers[kind.value]
        if rules is None:
            return
        known, required = rules["keys"], rules["required"]
        strays = {
            entry.key: closest(entry.key, known) for entry in provider.entries if entry.key not in known
        }
        for entry in provider.entries:
            if entry.key in strays:
                at = joined("provider", entry.key)
                if entry.key in self.schema["properties"]:
                    report.error(
                        entry.place, at, "does not belong here", "it belongs one level up, into the top level"
                    )
                else:
                    cure = did_you_mean(entry.key, known)
                    report.error(entry.place, at, f"is no key of provider {kind.value}", cure)
        for key in required:
            if provider.get(key) is None and key not in strays.values():
                report.error(provider, f"provider.{key}", "is required, and missing", f"write {key}: …")

    def _of_provider(self, kind: str | None) -> dict[str, Any]:
        """The schema with what is known of this cloud's node_config."""
        config = self.schema["x-node-config"].get(kind)
        if config is not None:
            nodes = self.schema["properties"]["available_node_types"]["additionalProperties"]
            nodes["properties"]["node_config"] = config
        return self.schema

    def _verdict(self, node: Node, report: Report) -> None:
        from fmray.runtime.ray_schemas import launcher_verdict

        verdict = launcher_verdict(node.plain())
        if verdict is not None:
            at, path = node, ""
            for part in verdict[0]:
                inner = at.get(str(part)) if isinstance(part, str) else None
                at, path = inner or at, joined(path, str(part)) if inner else path
            report.error(at, path, f"Ray refuses it: {verdict[1]}", "change it as the sentence says")


def _types(node: Node) -> list[tuple[str, Node]]:
    types = node.get("available_node_types")
    return [(e.key, e.node) for e in types.entries if e.node.kind == "mapping"] if types is not None else []


def _node_types(node: Node, report: Report) -> None:
    """Names and counts of node types."""
    types, head = _types(node), node.get("head_node_type")
    names = [name for name, _ in types]
    keys = [entry.key for entry in node.entries]
    if head is not None and head.kind == "string" and names and head.value not in names:
        cure = did_you_mean(head.value, names)
        report.error(head, "head_node_type", f"is {head.value!r}, which is no node type", cure)
    for one, other in (
        ("head_node_type", "available_node_types"),
        ("available_node_types", "head_node_type"),
    ):
        if one not in keys and other in keys and closest(one, keys, 0.85) is None:
            report.error(node, one, f"is required beside {other}", f"write {one}: …")
    total, most = 0.0, node.number("max_workers")
    for name, entry in types:
        path = joined("available_node_types", name)
        least, limit = entry.number("min_workers"), entry.number("max_workers")
        total += least or 0
        if least is not None and limit is not None and least > limit:
            at = entry.get("min_workers") or entry
            cure = f"write {limit:g} or less, or raise max_workers"
            report.error(at, f"{path}.min_workers", f"is {least:g}, more than max_workers {limit:g}", cure)
        if limit is not None and most is not None and limit > most:
            at = entry.get("max_workers") or entry
            problem = f"is {limit:g}, more than the cluster's max_workers {most:g}"
            report.error(
                at, f"{path}.max_workers", problem, "lower it, or raise max_workers at the top level"
            )
    if most is not None and total > most:
        at = node.get("max_workers") or node
        cure = f"write {total:g} or more"
        report.error(at, "max_workers", f"is {most:g}, less than the {total:g} of all min_workers", cure)


def _commands(node: Node, report: Report) -> None:
    """The commands that start Ray do what a launched cluster needs."""
    secure = "/home/ray/.ray/auth_token"
    mounts = node.get("file_mounts")
    mounted = (
        any(entry.key.endswith(".ray/auth_token") for entry in mounts.entries)
        if mounts is not None
        else False
    )
    for key, needs in (
        ("head_start_ray_commands", ("--head", "--autoscaling-config=")),
        ("worker_start_ray_commands", ("--address=",)),
    ):
        commands = [item for item in node.list_of(key) if item.kind == "string"]
        starts = [item for item in commands if re.search(r"\bray start\b", item.value)]
        if commands and not starts:
            report.error(
                commands[-1], key, "no command runs ray start", f"write ray start {' '.join(needs)}…"
            )
        for item in starts:
            at = f"{key}[{node.list_of(key).index(item)}]"
            for need in needs:
                if need not in item.value:
                    near = closest(need, re.findall(r"--[\w-]+=?", item.value), 0.8)
                    cure = f"write {need} instead of {near}" if near else f"add {need}"
                    report.error(item, at, f"ray start lacks {need}", cure)
            token = "RAY_AUTH_MODE=token" in item.value
            if token and not mounted:
                cure = f'add "{secure}": "~/.ray/auth_token" to file_mounts'
                report.error(item, at, "asks for a token that no node gets", cure)
            if "--dashboard-host=0.0.0.0" in item.value and not token:
                cure = "write --dashboard-host=127.0.0.1, or RAY_AUTH_MODE=token before it"
                report.error(item, at, "opens the dashboard to the network without a token", cure)
    images = {
        key: image_version(node.text("docker", key) or "") for key in ("image", "head_image", "worker_image")
    }
    found = {version for version in images.values() if version}
    if len(found) > 1:
        where = node.get("docker") or node
        report.error(
            where, "docker", f"has images of Ray {' and '.join(sorted(found))}", "write one version in all"
        )
