"""Data parallelism: every rank holds the whole model and a part of the batch; gradients are summed over the ranks."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nanopre import hookimpl
from nanopre.config import at_least
from nanopre.parallel import Layout


@dataclass
class DDP:
    """DistributedDataParallel (Li et al., 2020): gradients are summed in buckets while the backward pass goes on.

    Beside tensor or pipeline parallelism, which it does not know of, FSDP does the same with shards of one rank.
    """

    bucket_mb: int = 25  # MiB of gradients in one all-reduce

    phase = "data"

    def __post_init__(self):
        at_least(self, bucket_mb=1)

    def apply(self, parts: list[nn.Module], layout: Layout) -> list[nn.Module]:
        if layout.sizes["tensor"] > 1 or layout.sizes["pipeline"] > 1:
            for part in parts:
                fully_shard(part, mesh=layout.mesh["replicate", "shard"], reshard_after_forward=False)
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo can't scale while it sums
            return parts
        group = layout.mesh.get_group("replicate")
        wrapped = DistributedDataParallel(
            parts[0], process_group=group, bucket_cap_mb=self.bucket_mb, gradient_as_bucket_view=True
        )
        # DDP would take the mean. Losses here are sums divided by the global batch's targets, so gradients only add.
        wrapped.register_comm_hook(group, add)
        return [wrapped]


def add(group: dist.ProcessGroup, bucket: dist.GradBucket):
    """All-reduce a bucket of gradients by their sum."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@hookimpl
def nanopre_parallel(register):
    register("ddp", DDP)
