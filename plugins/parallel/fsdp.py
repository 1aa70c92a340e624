"""Fully sharded data parallelism: each rank keeps a shard of the parameters, gradients and optimizer states."""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from nanopre import hookimpl
from nanopre.config import at_least
from nanopre.parallel import Layout


@dataclass
class FSDP:
    """FSDP2 (Zhao et al., 2023): a block's parameters are gathered before it runs and its gradients reduce-scattered after.

    ZeRO's stage 3 (Rajbhandari et al., 2020). With reshard_after_forward = false a block's parameters stay gathered from
    the forward to the backward pass, which is stage 2 with one gather a step. With a degree below the number of
    data-parallel ranks each group of so many holds a copy of the model ("hybrid sharding").
    """

    degree: int = 0  # ranks that share a copy of the model; 0: all data-parallel ranks
    reshard_after_forward: bool = True
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # in which parameters are gathered; shards stay float32
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # in which gradients are summed
    cpu_offload: bool = False  # shards and optimizer states live in the CPU's memory

    phase = "data"

    def __post_init__(self):
        at_least(self, degree=0)

    def apply(self, parts: list[nn.Module], layout: Layout) -> list[nn.Module]:
        mesh = layout.mesh["shard"] if layout.sizes["replicate"] == 1 else layout.mesh["replicate", "shard"]
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.param_dtype == "bfloat16" else None,
            reduce_dtype=torch.bfloat16 if self.reduce_dtype == "bfloat16" else torch.float32,
            output_dtype=torch.float32,
        )
        offload = CPUOffloadPolicy(pin_memory=layout.mesh.device_type == "cuda") if self.cpu_offload else OffloadPolicy()
        options = {"mesh": mesh, "mp_policy": precision, "offload_policy": offload}
        # FSDP's autograd function makes views of a block's inputs, so a stream that a block hands on unchanged (the encoder's
        # output) leaves it as a view. The warning is of writing to such a view in place; no block writes to a stream.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
        for part in parts:
            for block in part.blocks.values():
                fully_shard(block, reshard_after_forward=self.reshard_after_forward, **options)
            fully_shard(part, reshard_after_forward=False, **options)  # the two ends are needed again at once
            for module in (part, *part.blocks.values()):
                # FSDP would take the mean. Losses here are sums divided by the global batch's targets, so gradients only add.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo can't scale while it sums
        return parts


@hookimpl
def nanopre_parallel(register):
    register("fsdp", FSDP)
