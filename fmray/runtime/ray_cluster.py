"""A Ray to work on, and whether it is large enough; for training and serving alike. Imports ray; knows no room."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from fmray.errors import ResourceError


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Inside, Ray is there: the one this process is in, the one at `address` or $RAY_ADDRESS, or a new one on this machine.

    Raises ResourceError where no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        # what workers print stays in Ray's log folder and its dashboard
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="warning")
        else:
            ray.init(
                num_cpus=os.cpu_count(),
                include_dashboard=True,  # without it Ray Train prints a failed query every few seconds
                log_to_driver=False,
                logging_level="warning",
                _system_config={
                    "worker_niceness": 0
                },  # on one machine, learners at low priority wait for Ray's own processes
            )
    except (ConnectionError, TimeoutError, ValueError) as error:
        raise ResourceError(
            f"runtime.address={address!r}: no Ray cluster answers: {str(error).splitlines()[0]}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def require_resources(wanted: dict[str, float], what: str, cure: str) -> None:
    """Refuse, before anything starts, what the cluster as it stands can never hold."""
    has = ray.cluster_resources()
    for name, amount in wanted.items():
        if amount > has.get(name, 0):
            raise ResourceError(
                f"{what} need {amount:g} {name}, but the cluster has {has.get(name, 0):g}: {cure}"
            )
