"""Replicas, queues and batches of a deployment that cannot go together."""

from __future__ import annotations

from fmray.checks.findings import Report
from fmray.checks.marked import Node

MOST_ONGOING = 5.0
"""Serve's `max_ongoing_requests` where none is written."""
TARGET_ONGOING = 2.0
"""Serve's `target_ongoing_requests` where none is written."""
METRICS_INTERVAL_S = 10.0
"""Replicas report every ten seconds: a shorter look back sees nothing."""


def check_scaling(deployment: Node, path: str, report: Report, batch: tuple[int, bool] | None) -> None:
    """`batch`: items of one batch and whether the file says so; None: the deployment is not one of ours."""
    scaling = deployment.get("autoscaling_config")
    if scaling is not None and scaling.kind == "mapping":
        fixed = deployment.entry("num_replicas")
        if fixed is not None and fixed.node.kind == "integer":
            cure = "remove one of them, or write num_replicas: auto"
            report.error(fixed.place, f"{path}.num_replicas", "stands beside autoscaling_config", cure)
        auto = deployment.text("num_replicas") == "auto"
        _bounds(scaling, f"{path}.autoscaling_config", report, 100.0 if auto else 1.0)
        _target(deployment, scaling, path, report, ours=batch is not None)
    _queue(deployment, path, report, batch)
    _whole_gpus(deployment, path, report)


def _bounds(scaling: Node, path: str, report: Report, unwritten_most: float) -> None:
    least, first, most = (scaling.number(f"{key}_replicas") for key in ("min", "initial", "max"))
    bottom, top = 1.0 if least is None else least, unwritten_most if most is None else most
    said = f"max_replicas {top:g}" + ("" if most is not None else " (where none is written)")
    if bottom > top:
        at = scaling.get("min_replicas" if least is not None else "max_replicas") or scaling
        key = "min_replicas" if least is not None else "max_replicas"
        cure = f"write max_replicas: {bottom:g} or more, or lower min_replicas"
        report.error(at, f"{path}.{key}", f"min_replicas {bottom:g} exceeds {said}", cure)
    elif first is not None and not bottom <= first <= top:
        problem = f"is {first:g}, outside min_replicas {bottom:g} to {said}"
        at = scaling.get("initial_replicas") or scaling
        report.error(at, f"{path}.initial_replicas", problem, f"write {bottom:g} to {top:g}")
    look_back = scaling.number("look_back_period_s")
    if look_back is not None and 0 < look_back <= METRICS_INTERVAL_S:
        problem = f"is {look_back:g} s, not longer than the {METRICS_INTERVAL_S:g} s between two reports"
        at = scaling.get("look_back_period_s") or scaling
        report.error(at, f"{path}.look_back_period_s", problem, "write more than 10, such as 30")


def _target(deployment: Node, scaling: Node, path: str, report: Report, *, ours: bool) -> None:
    """A target above what a replica takes at once is never reached: it would never scale up."""
    target, most = scaling.number("target_ongoing_requests"), deployment.number("max_ongoing_requests")
    if most is None and ours:
        return  # our builder derives it from the batch
    aim, limit = TARGET_ONGOING if target is None else target, MOST_ONGOING if most is None else most
    if aim > limit:
        said = "" if most is not None else " (where none is written)"
        key = "autoscaling_config.target_ongoing_requests" if target is not None else "max_ongoing_requests"
        problem = f"target_ongoing_requests {aim:g} exceeds max_ongoing_requests {limit:g}{said}"
        at = scaling.get("target_ongoing_requests") or deployment.get("max_ongoing_requests") or deployment
        cure = f"write max_ongoing_requests: {aim:g} or more, or lower the target"
        report.error(at, f"{path}.{key}", problem, cure)


def _queue(deployment: Node, path: str, report: Report, batch: tuple[int, bool] | None) -> None:
    most = deployment.number("max_ongoing_requests")
    at = deployment.get("max_ongoing_requests") or deployment
    if batch is not None and most is not None and most >= 1:
        items, said = batch
        # one batch is computed while the next one gathers; where the file does not say, one full batch must be possible
        needs = 2 * items if said else items
        if most < needs:
            problem = f"is {most:g}, less than {'two batches' if said else 'one batch'} of {items}"
            cure = f"write {2 * items}, twice batch.max_items, or lower batch.max_items"
            report.error(at, f"{path}.max_ongoing_requests", problem, cure)
    queued = deployment.number("max_queued_requests")
    if queued == 0:
        at = deployment.get("max_queued_requests") or deployment
        report.error(at, f"{path}.max_queued_requests", "is 0", "must be at least 1, or -1 for no limit")


def _whole_gpus(deployment: Node, path: str, report: Report) -> None:
    gpus = deployment.number("ray_actor_options", "num_gpus")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        problem = f"is {gpus:g}: only fractions below one GPU can be shared"
        at = deployment.get("ray_actor_options", "num_gpus") or deployment
        report.error(
            at, f"{path}.ray_actor_options.num_gpus", problem, f"write {int(gpus)} or {int(gpus) + 1}"
        )
