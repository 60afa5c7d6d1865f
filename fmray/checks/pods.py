"""A pod template's own contradictions: names that nothing carries, requests above limits, devices that are not whole."""

from __future__ import annotations

from collections.abc import Sequence

from fmray.checks.capacity import quantity
from fmray.checks.findings import Report, did_you_mean, joined
from fmray.checks.marked import Node
from fmray.checks.variables import strange_variable


def check_pod(template: Node, path: str, report: Report) -> None:
    """`template`: a mapping with a `spec`."""
    spec, at = template.get("spec"), f"{path}.spec"
    if spec is None or spec.kind != "mapping":
        return
    volumes = [str(volume.text("name")) for volume in spec.list_of("volumes")]
    _no_twins(spec.list_of("volumes"), f"{at}.volumes", "volume", report)
    for key in ("containers", "initContainers"):
        _no_twins(spec.list_of(key), f"{at}.{key}", "container", report)
        for number, container in enumerate(spec.list_of(key)):
            inside = f"{at}.{key}[{number}]"
            _no_twins(container.list_of("env"), f"{inside}.env", "variable", report)
            _no_twins(container.list_of("ports"), f"{inside}.ports", "port", report)
            _mounts(container, volumes, inside, report)
            _resources(container, inside, report)
            _variables(container, inside, report)


def _no_twins(nodes: Sequence[Node], path: str, what: str, report: Report) -> None:
    seen: set[str] = set()
    for number, node in enumerate(nodes):
        name = node.text("name")
        if name is not None and name in seen:
            at = node.get("name") or node
            problem = f"is {name!r}, as an earlier {what} is"
            report.error(at, f"{path}[{number}].name", problem, f"give each {what} a name of its own")
        seen.add(name or "")


def _mounts(container: Node, volumes: list[str], path: str, report: Report) -> None:
    for number, mount in enumerate(container.list_of("volumeMounts")):
        name = mount.get("name")
        if name is not None and name.kind == "string" and name.value not in volumes:
            cure = (
                did_you_mean(name.value, volumes, "the pod's volumes are") if volumes else "add it to volumes"
            )
            problem = f"is {name.value!r}, which is no volume of this pod"
            report.error(name, f"{path}.volumeMounts[{number}].name", problem, cure)


def _resources(container: Node, path: str, report: Report) -> None:
    limits, requests = (container.get("resources", key) for key in ("limits", "requests"))
    for entry in requests.entries if requests is not None else ():
        limit = limits.get(entry.key) if limits is not None else None
        asked, most = quantity(entry.node.value), quantity(limit.value) if limit is not None else None
        device = "/" in entry.key
        if asked is None or (most is None and not device):
            continue
        at = joined(f"{path}.resources.requests", entry.key)
        if most is None:
            cure = "write it under limits too: devices cannot be shared out beyond what there is"
            report.error(entry.node, at, "has no limit", cure)
        elif asked > most:
            problem = f"is {entry.node.value}, more than the limit {limit.value if limit else ''}"
            report.error(entry.node, at, problem, "lower it, or raise the limit")
        elif device and asked != most:
            problem = f"is {entry.node.value}, the limit is {limit.value if limit else ''}"
            report.error(entry.node, at, problem, "write the same number in both: devices are given whole")
    for entry in limits.entries if limits is not None else ():
        amount = quantity(entry.node.value)
        if amount is not None and (amount < 0 or ("/" in entry.key and amount != int(amount))):
            at = joined(f"{path}.resources.limits", entry.key)
            report.error(entry.node, at, f"is {entry.node.value}", "must be a whole number, at least 0")


def _variables(container: Node, path: str, report: Report) -> None:
    """Serve's own variables by name: a misspelt one is read by nobody."""
    for number, variable in enumerate(container.list_of("env")):
        name = variable.get("name")
        if name is not None and name.kind == "string":
            cure = strange_variable(name.value)
            if cure:
                report.error(
                    name, f"{path}.env[{number}].name", f"is {name.value!r}, which nothing reads", cure
                )
