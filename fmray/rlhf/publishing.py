"""From the learners' weights to every replica of the rollout policy, with proof that they arrived."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fmray.config.rlhf import RlhfConfig
from fmray.errors import PoolError
from fmray.rlhf.roles import ROLLOUT, RolloutPolicy
from fmray.runtime.context import Context
from fmray.runtime.weights import Published
from fmray.training.engine import Engine


def publish(
    policy: nn.Module, engine: Engine, version: int, config: RlhfConfig, context: Context
) -> Published | None:
    """Put the policy's learning weights into the store as `version` and load them in every replica; a collective.

    Returns what was published, on rank 0. Raises PoolError where a replica holds something else afterwards.
    """
    buckets = weight_buckets(policy, engine, config)
    published = None
    if context.rank == 0:
        published = context.pools.weights.publish(version, buckets)
        pool = context.pools[ROLLOUT]
        for found in pool.broadcast(RolloutPolicy.load, version, phase=f"load weights {version}"):
            if found != published.checksum:
                raise PoolError(
                    f"pool '{ROLLOUT}', phase load weights {version}: a replica holds {found:016x}, "
                    f"the learner published {published.checksum:016x}"
                )
    else:
        for _ in buckets:  # gathering a sharded parameter needs every rank
            pass
    context.barrier()
    return published


def weight_buckets(policy: nn.Module, engine: Engine, config: RlhfConfig) -> Iterator[dict[str, Tensor]]:
    """The weights that learn, whole, in the rollout's precision, by their names in the policy.

    Cut into buckets of about `rollout.bucket_mib`; under ZeRO-3 only one bucket is ever gathered. A collective.
    """
    dtype = torch.bfloat16 if config.rollout.precision == "bf16" else torch.float32
    limit = config.rollout.bucket_mib * 2**20
    bucket: dict[str, nn.Parameter] = {}
    size = 0
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        numel = getattr(parameter, "ds_numel", parameter.numel())
        if bucket and size + numel * dtype.itemsize > limit:
            yield from _gathered(bucket, engine, dtype)
            bucket, size = {}, 0
        bucket[name] = parameter
        size += numel * dtype.itemsize
    if bucket:
        yield from _gathered(bucket, engine, dtype)


def _gathered(
    bucket: dict[str, nn.Parameter], engine: Engine, dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    with engine.gathered(list(bucket.values())):
        yield {name: p.detach().to("cpu", dtype).contiguous() for name, p in bucket.items()}
