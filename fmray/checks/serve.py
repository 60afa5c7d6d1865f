"""A Serve config, read strictly: what Ray drops in silence, and what would fail only once it is deployed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from fmray.checks.capacity import Cluster, Replica
from fmray.checks.findings import Report, closest, did_you_mean, joined
from fmray.checks.imports import Wrong, check_import_path, deployment_names, module_source
from fmray.checks.marked import Node
from fmray.checks.scaling import check_scaling
from fmray.checks.schemas import StrictSchema
from fmray.checks.serve_schema import RENAMED, tightened
from fmray.config.serving import ServeConfig
from fmray.errors import ConfigError
from fmray.runtime.ray_schemas import serve_schema, serve_verdict


@dataclass(frozen=True, slots=True)
class Builder:
    """An application builder whose `args` and deployments are known."""

    args: type[BaseModel]
    """What `args` must be."""
    changeable: tuple[str, ...]
    """Keys of it that a `user_config` may hold."""
    deployments: tuple[str, ...]


BUILDERS = {"fmray.serving.deploy:app": Builder(ServeConfig, ("checkpoint", "batch"), ("Model",))}
DEFAULT_BATCH = 32
"""Items of one batch where `batch.max_items` is not written (config/serving.py)."""


class Asked(NamedTuple):
    """What a deployment asks of a cluster."""

    node: Node
    path: str
    replica: Replica
    least: float
    most: float
    most_at: Node


@dataclass
class ServeCheck:
    """The check of Serve configs; made once, its schema is read from the installed Ray."""

    schema: dict[str, Any] = field(default_factory=lambda: tightened())

    def __post_init__(self) -> None:
        self._strict = StrictSchema(self.schema, RENAMED)

    def check(self, node: Node, report: Report, path: str = "", cluster: Cluster | None = None) -> None:
        """Everything that is wrong with one Serve config; `cluster`: what it must fit into, where that is known."""
        before = report.mark()
        self._strict.check(node, report, path)
        applications = list(_numbered(node, path, "applications"))
        _no_twins(applications, "name", "application", report)
        _no_twins(applications, "route_prefix", "application", report)
        asked = [
            ask for at, application in applications for ask in self._application(application, at, report)
        ]
        if cluster is not None:
            _fits(asked, cluster, report)
        if report.mark() == before:
            self._verdict(node, report, path)

    def _application(self, node: Node, path: str, report: Report) -> Iterator[Asked]:
        import_path = node.get("import_path")
        builder, names = None, None
        if import_path is not None and import_path.kind == "string" and import_path.value:
            wrong = check_import_path(import_path.value)
            if wrong:
                report.error(import_path, f"{path}.import_path", wrong.problem, wrong.cure)
                builder = BUILDERS.get(
                    closest(import_path.value, BUILDERS, 0.8) or ""
                )  # the one that was meant
            else:
                builder, names = _what(import_path.value)
        elif import_path is None:
            builder = next(iter(BUILDERS.values()))
        deployments = list(_numbered(node, path, "deployments"))
        _no_twins(deployments, "name", "deployment", report)
        args = node.get("args")
        if builder is not None:
            self._model(builder, args, node, f"{path}.args", report)
        for at, deployment in deployments:
            name = deployment.get("name")
            if names is not None and name is not None and name.value not in names:
                problem = f"is {name.value!r}, which this application does not have"
                report.error(
                    name, f"{at}.name", problem, did_you_mean(str(name.value), sorted(names), "it has")
                )
            user = deployment.get("user_config")
            if builder is not None and user is not None and user.kind == "mapping":
                self._user_config(builder, user, f"{at}.user_config", report)
            check_scaling(deployment, at, report, _batch(user, args) if builder else None)
            _paths_in(deployment, at, report)
            yield _asked(deployment, at)

    def _model(self, builder: Builder, args: Node | None, owner: Node, path: str, report: Report) -> None:
        """`args` against the configuration that the builder reads, as strictly as a command line is read."""
        given = args if args is not None else Node("mapping", owner.place)
        if given.kind != "mapping":
            return
        strict = _strict(builder, whole=True)
        before = report.mark()
        strict.check(given, report, path)
        if report.mark() > before:
            return
        try:
            builder.args.model_validate(given.plain())
        except ValidationError as error:
            for detail in error.errors():
                _residual(given, path, detail, report)

    def _user_config(self, builder: Builder, user: Node, path: str, report: Report) -> None:
        _strict(builder, whole=False).check(user, report, path)

    def _verdict(self, node: Node, report: Report, path: str) -> None:
        """Ray's own word, for what this check does not know."""
        for location, sentence in serve_verdict(node.plain()):
            at, inside = _at(node, path, location)
            report.error(at, inside, f"Ray Serve refuses it: {sentence}", "change it as the sentence says")


@cache
def _strict(builder: Builder, *, whole: bool) -> StrictSchema:
    """The schema of a builder's `args`, or of what of them a `user_config` may hold."""
    schema = builder.args.model_json_schema()
    if whole:
        parts = serve_schema()["$defs"]
        for part, place in (
            ("RayActorOptionsSchema", "the deployment's ray_actor_options"),
            ("DeploymentSchema", "the deployment"),
            ("ServeApplicationSchema", "the application, one level up"),
        ):
            schema.setdefault("x-elsewhere", {}).update(dict.fromkeys(parts[part]["properties"], place))
    else:
        keys = schema["properties"]
        elsewhere = {key: "args: a replica cannot change it" for key in keys if key not in builder.changeable}
        schema["properties"] = {key: keys[key] for key in builder.changeable}
        schema |= {"required": [], "x-elsewhere": elsewhere}
    return StrictSchema(schema)


def _what(import_path: str) -> tuple[Builder | None, set[str] | None]:
    """The known builder behind an import path, and the names of its deployments where they can be told."""
    module, _, attribute = import_path.rpartition(":" if ":" in import_path else ".")
    builder = BUILDERS.get(f"{module}:{attribute}")
    if builder is not None:
        return builder, {*builder.deployments}
    source = module_source(module)
    return None, deployment_names(source) if isinstance(source, Path) else None


def _numbered(node: Node, path: str, key: str) -> Iterator[tuple[str, Node]]:
    base = joined(path, key)
    for number, item in enumerate(node.list_of(key)):
        if item.kind == "mapping":
            yield f"{base}[{number}]", item


def _no_twins(nodes: list[tuple[str, Node]], key: str, what: str, report: Report) -> None:
    seen: dict[object, str] = {}
    for path, node in nodes:
        unwritten: object = {"route_prefix": "/", "name": "default"}[key] if what == "application" else None
        given = node.get(key)
        value = given.value if given is not None else unwritten
        if value is None:
            continue
        if value in seen:
            problem = f"is {value!r}, as {seen[value]} is"
            report.error(given or node, f"{path}.{key}", problem, f"give each {what} its own {key}")
        seen.setdefault(value, f"{path}.{key}")


def _batch(user: Node | None, args: Node | None) -> tuple[int, bool]:
    """Items of a deployment's batch, and whether the file says so."""
    for node in (user, args):
        number = node.number("batch", "max_items") if node is not None else None
        if number is not None:
            return int(number), True
    return DEFAULT_BATCH, False


def _paths_in(deployment: Node, path: str, report: Report) -> None:
    """Import paths that stand deeper in a deployment."""
    for keys in (
        ("autoscaling_config", "policy", "policy_function"),
        ("request_router_config", "request_router_class"),
    ):
        found = deployment.get(*keys)
        if found is not None and found.kind == "string":
            wrong = check_import_path(found.value)
            if isinstance(wrong, Wrong):
                report.error(found, f"{path}.{'.'.join(keys)}", wrong.problem, wrong.cure)


def _asked(node: Node, path: str) -> Asked:
    options = node.get("ray_actor_options") or node
    cpus = options.number("num_cpus")
    replica = Replica(
        1.0 if cpus is None else cpus, options.number("num_gpus") or 0.0, options.number("memory") or 0.0
    )
    for keys in (("autoscaling_config", "max_replicas"), ("num_replicas",)):
        most = node.number(*keys)
        if most is not None:
            least = node.number("autoscaling_config", "min_replicas") if len(keys) == 2 else most
            at = node.get(*keys) or node
            return Asked(node, f"{path}.{'.'.join(keys)}", replica, 1 if least is None else least, most, at)
    return Asked(node, path, replica, 1, 1, node)


def _fits(asked: list[Asked], cluster: Cluster, report: Report) -> None:
    """Replicas of each deployment at its largest, and of all at their smallest."""
    for ask in asked:
        per_node = ask.node.number("max_replicas_per_node")
        holds = cluster.holds(ask.replica, per_node)
        wants = f"{ask.replica.cpus:g} CPUs and {ask.replica.gpus:g} GPUs"
        if holds == 0:
            problem = (
                f"no node can hold one replica, which asks for {wants}: the largest has {cluster.largest()}"
            )
            where = ask.node.get("ray_actor_options") or ask.node
            report.error(where, ask.path, problem, "lower num_cpus and num_gpus, or use larger nodes")
        elif ask.most > holds:
            problem = f"asks for {ask.most:g} replicas of {wants}, the cluster holds {holds:g} at its largest"
            cure = f"lower it to {holds:g}, or raise the cluster's maxReplicas"
            report.error(ask.most_at, ask.path, problem, cure)
    least = sum(ask.least * ask.replica.gpus for ask in asked)
    if least > cluster.gpus and asked:
        problem = (
            f"all deployments together ask for {least:g} GPUs at least, the cluster has {cluster.gpus:g}"
        )
        cure = "lower min_replicas or num_gpus, or raise the cluster's maxReplicas"
        report.error(asked[-1].node, asked[-1].path, problem, cure)


def _at(node: Node, path: str, location: tuple[str | int, ...]) -> tuple[Node, str]:
    """The node nearest to a pydantic location, and its path."""
    for part in location:
        if isinstance(part, int) and part < len(node.items):
            node, path = node.items[part], f"{path}[{part}]"
        elif isinstance(part, str) and node.get(part) is not None:
            node, path = node.get(part) or node, joined(path, part)
    return node, path


def _residual(node: Node, path: str, detail: Mapping[str, Any], report: Report) -> None:
    at, inside = _at(node, path, detail["loc"])
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        at, inside = _at(node, path, tuple(cause.key.split(".")))
        report.error(at, inside, f"is {cause.value!r}", cause.cure)
    else:
        report.error(at, inside, f"is {detail['input']!r}", detail["msg"][0].lower() + detail["msg"][1:])
