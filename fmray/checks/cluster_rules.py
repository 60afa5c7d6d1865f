"""What KubeRay's operator refuses in a cluster although the CRD lets it pass (v1.7), and what cannot work once it runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from fmray.checks.capacity import Cluster, NodeGroup, quantity
from fmray.checks.findings import Report, closest, joined
from fmray.checks.marked import Node

Rule = Callable[[Node, str, Node, Report], None]
"""A rule is told the cluster's spec, its path, the whole document, and where to report."""
OWN_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
AUTH_SINCE, K8S_AUTH_SINCE, V2_SINCE = (2, 52), (2, 55), (2, 47)
"""Versions of Ray with token authentication, with Kubernetes' tokens, with autoscaler v2 as the default."""


def version_of(text: str | None) -> tuple[int, ...] | None:
    """`2.60.0` as (2, 60, 0); None: no version."""
    found = re.match(r"\d+\.\d+(\.\d+)?", text or "")
    return tuple(int(part) for part in found.group().split(".")) if found else None


def groups(cluster: Node, path: str) -> Iterator[tuple[str, Node]]:
    """The head group and all worker groups."""
    head = cluster.get("headGroupSpec")
    if head is not None and head.kind == "mapping":
        yield f"{path}.headGroupSpec", head
    for number, group in enumerate(cluster.list_of("workerGroupSpecs")):
        if group.kind == "mapping":
            yield f"{path}.workerGroupSpecs[{number}]", group


def container_of(group: Node) -> Node | None:
    """The container that runs Ray: the first."""
    containers = group.list_of("template", "spec", "containers")
    return containers[0] if containers and containers[0].kind == "mapping" else None


def autoscaled(cluster: Node) -> bool:
    """Whether Ray's autoscaler runs."""
    flag = cluster.get("enableInTreeAutoscaling")
    return flag is not None and flag.value is True


def autoscaler_v2(cluster: Node) -> bool:
    """Whether the second autoscaler runs: named, or the version's default."""
    named = cluster.text("autoscalerOptions", "version")
    version = version_of(cluster.text("rayVersion"))
    return autoscaled(cluster) and (named == "v2" if named else version is not None and version >= V2_SINCE)


def worker_counts(cluster: Node, path: str, document: Node, report: Report) -> None:
    """minReplicas ≤ replicas ≤ maxReplicas, and both bounds written where no autoscaler sets them."""
    names: set[str] = set()
    for at, group in list(groups(cluster, path))[1:]:
        name = group.text("groupName")
        if name is not None and name in names:
            where = group.get("groupName") or group
            report.error(
                where, f"{at}.groupName", f"is {name!r}, as an earlier group is", "give it its own name"
            )
        names.add(name or "")
        least, wanted, most = (group.number(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        keys = [entry.key for entry in group.entries]
        for key, value in (("minReplicas", least), ("maxReplicas", most)):
            if value is None and not autoscaled(cluster) and closest(key, keys, 0.85) is None:
                report.error(group, f"{at}.{key}", "is required without the autoscaler", f"write {key}: …")
        if least is not None and most is not None and least > most:
            cure = f"write {most:g} or less, or raise maxReplicas"
            where = group.get("minReplicas") or group
            report.error(where, f"{at}.minReplicas", f"is {least:g}, more than maxReplicas {most:g}", cure)
        elif wanted is not None and not (least or 0) <= wanted <= (math.inf if most is None else most):
            limits = f"minReplicas {least or 0:g} to maxReplicas {'any' if most is None else f'{most:g}'}"
            where = group.get("replicas") or group
            report.error(
                where, f"{at}.replicas", f"is {wanted:g}, outside {limits}", "write a number between"
            )


def group_resources(cluster: Node, path: str, document: Node, report: Report) -> None:
    """Resources and labels are said in one place."""
    for at, group in groups(cluster, path):
        params = group.get("rayStartParams")
        for key in OWN_RESOURCES if group.get("resources") is not None and params is not None else ():
            entry = params.entry(key) if params is not None else None
            if entry is not None:
                problem = f"stands beside {at}.resources"
                cure = "keep one of them: the operator refuses both"
                report.error(entry.place, joined(f"{at}.rayStartParams", key), problem, cure)
        labels = params.entry("labels") if params is not None else None
        if labels is not None:
            cure = f"write them as {at}.labels"
            report.error(labels.place, f"{at}.rayStartParams.labels", "is refused by the operator", cure)
        host = params.get("dashboard-host") if params is not None else None
        if host is not None and host.value == "0.0.0.0" and cluster.text("authOptions", "mode") != "token":
            cure = "write authOptions: {mode: token} beside it: who reaches the dashboard can run code"
            problem = "opens the dashboard to the network without a token"
            report.error(host, joined(f"{at}.rayStartParams", "dashboard-host"), problem, cure)


def versions(cluster: Node, path: str, document: Node, report: Report) -> None:
    """rayVersion is that of every image, and new enough for what is asked."""
    given, at = cluster.text("rayVersion"), cluster.get("rayVersion") or cluster
    version = version_of(given)
    for inside, group in groups(cluster, path):
        container = container_of(group)
        image = container.get("image") if container is not None else None
        tag = image_version(str(image.value)) if image is not None else None
        if image is not None and tag and given and tag != given:
            problem = f"is {given}, the image {image.value} has Ray {tag}"
            cure = f"write {tag} in both, or change {inside}.template.spec.containers[0].image"
            report.error(at, f"{path}.rayVersion", problem, cure)
            break
    auth = cluster.get("authOptions")
    if auth is None or auth.kind != "mapping":
        return
    kubernetes = auth.get("enableK8sTokenAuth")
    asks_kubernetes = kubernetes is not None and kubernetes.value is True
    said = given is not None or closest("rayVersion", [entry.key for entry in cluster.entries], 0.8) is None
    if auth.text("mode") in ("token", None) and (version is None or version < AUTH_SINCE) and said:
        problem = f"is {given or 'missing'}, and authOptions needs 2.52.0 or newer"
        cure = 'write the version of the image, such as "2.60.0"'
        report.error(at, f"{path}.rayVersion", problem, cure)
    if kubernetes is not None and asks_kubernetes:
        problems = [
            (
                document.text("kind") != "RayCluster",
                "is not supported for RayJob and RayService",
                "remove it",
            ),
            (auth.text("secretName") is not None, "cannot stand beside secretName", "keep one of them"),
            (
                version is not None and version < K8S_AUTH_SINCE,
                "needs Ray 2.55.0 or newer",
                "raise rayVersion",
            ),
        ]
        for wrong, problem, cure in problems:
            if wrong:
                report.error(kubernetes, f"{path}.authOptions.enableK8sTokenAuth", problem, cure)


def image_version(image: str) -> str | None:
    """The Ray in an image, where its tag says: `rayproject/ray:2.60.0-py311` or `fmray:0.1.0-ray2.60.0`."""
    name, _, tag = image.rpartition("/")[2].partition(":")
    found = re.search(r"(?:^|-)ray(\d+\.\d+\.\d+)", tag)
    if found is None and re.fullmatch(r"ray(-\w+)?", name):
        found = re.match(r"(\d+\.\d+\.\d+)", tag)
    return found.group(1) if found else None


def fault_tolerance(cluster: Node, path: str, document: Node, report: Report) -> None:
    """Redis is said in gcsFaultToleranceOptions, and nowhere else."""
    options = cluster.get("gcsFaultToleranceOptions")
    head = cluster.get("headGroupSpec")
    container = container_of(head) if head is not None else None
    at = f"{path}.headGroupSpec.template.spec.containers[0].env"
    names = {
        "RAY_REDIS_ADDRESS": "redisAddress",
        "REDIS_PASSWORD": "redisPassword",
        "REDIS_USERNAME": "redisUsername",
    }
    for number, variable in enumerate(container.list_of("env") if container is not None else ()):
        name = variable.text("name") or ""
        if name in names and (options is not None or name != "REDIS_PASSWORD"):
            where = variable.get("name") or variable
            cure = f"write gcsFaultToleranceOptions.{names[name]} instead"
            report.error(where, f"{at}[{number}].name", f"{name} is refused by the operator", cure)
    params = head.get("rayStartParams") if head is not None else None
    for key in ("redis-password", "redis-username"):
        entry = params.entry(key) if params is not None else None
        if entry is not None and (options is not None or key == "redis-username"):
            cure = f"write gcsFaultToleranceOptions.{'redisPassword' if 'pass' in key else 'redisUsername'} instead"
            inside = joined(f"{path}.headGroupSpec.rayStartParams", key)
            report.error(entry.place, inside, "is refused by the operator", cure)
    for key, cure in (
        ("ray.io/ft-enabled", "remove it: gcsFaultToleranceOptions says it"),
        ("ray.io/external-storage-namespace", "write gcsFaultToleranceOptions.externalStorageNamespace"),
    ):
        notes = document.get("metadata", "annotations")
        entry = notes.entry(key) if notes is not None else None
        if entry is not None and options is not None:
            note = joined("metadata.annotations", key)
            report.error(entry.place, note, "cannot stand beside gcsFaultToleranceOptions", cure)
    if options is not None and options.kind == "mapping":
        _backend(options, f"{path}.gcsFaultToleranceOptions", report)


def _backend(options: Node, path: str, report: Report) -> None:
    rocks = options.text("backend") == "rocksdb"
    for key in (
        ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace")
        if rocks
        else ("storage",)
    ):
        entry = options.entry(key)
        if entry is not None:
            problem = f"does not go with backend: {'rocksdb' if rocks else 'redis'}"
            report.error(entry.place, f"{path}.{key}", problem, "remove it, or change the backend")
    keys = [entry.key for entry in options.entries]
    if not rocks and "redisAddress" not in keys and closest("redisAddress", keys, 0.8) is None:
        report.error(options, f"{path}.redisAddress", "is required, and missing", "write host:port of Redis")


def restarts(cluster: Node, path: str, document: Node, report: Report) -> None:
    """What goes with the autoscaler and its second version."""
    second = autoscaler_v2(cluster)
    for at, group in groups(cluster, path):
        policy = group.get("template", "spec", "restartPolicy")
        if second and policy is not None and policy.value in ("Always", "OnFailure"):
            where = f"{at}.template.spec.restartPolicy"
            report.error(
                policy, where, f"is {policy.value}, refused with autoscaler v2", "write Never, or remove it"
            )
        idle = group.get("idleTimeoutSeconds")
        if idle is not None and not second and at != f"{path}.headGroupSpec":
            cure = "write autoscalerOptions: {version: v2} with enableInTreeAutoscaling: true"
            report.error(idle, f"{at}.idleTimeoutSeconds", "needs autoscaler v2", cure)
        suspend = group.get("suspend")
        if suspend is not None and suspend.value is True and autoscaled(cluster):
            report.error(suspend, f"{at}.suspend", "cannot stand with the autoscaler", "remove it")
    options = cluster.entry("autoscalerOptions")
    flag = cluster.get("enableInTreeAutoscaling")
    near = closest("enableInTreeAutoscaling", [entry.key for entry in cluster.entries], 0.8)
    if options is not None and not autoscaled(cluster) and (flag is None) == (near is None):
        cure = "write enableInTreeAutoscaling: true, or remove it"
        report.error(
            options.place, f"{path}.autoscalerOptions", "is read by nobody: there is no autoscaler", cure
        )
    for number, variable in enumerate(cluster.list_of("autoscalerOptions", "env")):
        if variable.text("name") == "KUBERAY_GEN_AUTOSCALER_START_CMD":
            where = f"{path}.autoscalerOptions.env[{number}].name"
            report.error(variable, where, "is the operator's own", "remove it")


def network(cluster: Node, path: str, document: Node, report: Report) -> None:
    """Rules of a network policy name groups that exist."""
    names = [str(group.text("groupName")) for group in cluster.list_of("workerGroupSpecs")]
    for number, rules in enumerate(cluster.list_of("networkPolicy", "workerGroups")):
        name = rules.get("groupName")
        if name is not None and name.value not in names:
            near = closest(str(name.value), names)
            cure = f"did you mean {near}?" if near else f"there are: {', '.join(names)}"
            where = f"{path}.networkPolicy.workerGroups[{number}].groupName"
            report.error(name, where, f"is {name.value!r}, which is no worker group", cure)


def head_name(cluster: Node, path: str, document: Node, report: Report) -> None:
    """A RayService names its head service itself; upgradeStrategy is for clusters of one's own."""
    name = cluster.get("headGroupSpec", "headService", "metadata", "name")
    if document.text("kind") == "RayService" and name is not None:
        where = f"{path}.headGroupSpec.headService.metadata.name"
        report.error(name, where, "is refused in a RayService", "remove it: the operator names the service")
    strategy = cluster.entry("upgradeStrategy")
    if document.text("kind") in ("RayService", "RayJob") and strategy is not None:
        cure = "remove it, or for a RayService write spec.upgradeStrategy"
        report.error(strategy.place, f"{path}.upgradeStrategy", "is refused in a RayJob or RayService", cure)


CLUSTER_RULES: tuple[Rule, ...] = (
    *(worker_counts, group_resources, versions, fault_tolerance, restarts, network, head_name),
)


def cluster_size(cluster: Node) -> Cluster:
    """What it can hold at its largest."""
    found: list[NodeGroup] = []
    for at, group in groups(cluster, "rayClusterConfig"):
        count = 1.0
        if not at.endswith("headGroupSpec"):
            most = group.number("maxReplicas") if autoscaled(cluster) else group.number("replicas")
            count = (math.inf if most is None else most) * (group.number("numOfHosts") or 1)
        container = container_of(group)
        sizes = {
            "cpus": _size(group, container, ("num-cpus", "CPU"), lambda name: name == "cpu"),
            "gpus": _size(group, container, ("num-gpus", "GPU"), lambda name: name.endswith("/gpu")),
            "memory": _size(group, container, ("memory", "memory"), lambda name: name == "memory"),
        }
        if sizes["gpus"] is None:
            sizes["gpus"] = 0.0  # KubeRay starts Ray with the devices of the limits: none there, none in Ray
        found.append(NodeGroup(at, count, **sizes))
    return Cluster(tuple(found))


def _size(
    group: Node, container: Node | None, own: tuple[str, str], is_it: Callable[[str], bool]
) -> float | None:
    """Of one resource: what the group tells Ray, else the container's limit, else its request."""
    for node in (group.get("resources", own[1]), group.get("rayStartParams", own[0])):
        if node is not None and quantity(node.value) is not None:
            return quantity(node.value)
    for key in ("limits", "requests"):
        resources = container.get("resources", key) if container is not None else None
        for entry in resources.entries if resources is not None else ():
            if is_it(entry.key):
                return quantity(entry.node.value)
    return None
