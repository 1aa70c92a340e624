"""Data parallelism: every rank holds the whole model and a part of the batch; gradients are summed over the ranks."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from nanopre import hookimpl


@dataclass
class DDP:
    """DistributedDataParallel (Li et al., 2020): gradients are summed in buckets while the backward pass goes on."""

    bucket_mb: int = 25  # MiB of gradients in one all-reduce

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        group = mesh["data"].get_group()
        wrapped = DistributedDataParallel(
            model, process_group=group, bucket_cap_mb=self.bucket_mb, gradient_as_bucket_view=True
        )
        # DDP would take the mean. Losses here are sums divided by the global batch's targets, so gradients only add.
        wrapped.register_comm_hook(group, add)
        return wrapped


def add(group: dist.ProcessGroup, bucket: dist.GradBucket):
    """All-reduce a bucket of gradients by their sum."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


@hookimpl
def nanopre_parallel(register):
    register("ddp", DDP)
