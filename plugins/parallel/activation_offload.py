"""Activation offload: what a block's backward pass needs waits for it in the CPU's memory."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.tensor import DTensor

from nanopre import hookimpl
from nanopre.parallel import Layout


@dataclass
class ActivationOffload:
    """A block's saved tensors go to the CPU in the forward pass and come back in the backward pass (Rhu et al., 2016).

    Nothing is computed twice; each byte crosses the bus twice instead. With activation_checkpointing only what that leaves
    is moved: in its mode "full" the stream that enters each block. On a CPU nothing moves.
    """

    phase = "memory"

    def apply(self, parts: list[nn.Module], layout: Layout) -> list[nn.Module]:
        for part in parts:
            for name, block in part.blocks.items():
                part.blocks[name] = OffloadedBlock(block)
        return parts


class OffloadedBlock(ActivationWrapper):
    """A block whose saved tensors wait on the CPU, but for its parameters, which stay on the device in any case."""

    def forward(self, *state: Tensor, **batch) -> tuple[Tensor, ...]:
        parameters = {memory(p) for p in self.parameters()}
        with saved_tensors_hooks(lambda t: t if memory(t) in parameters else Offloaded(t), back):
            return self._checkpoint_wrapped_module(*state, **batch)


class Offloaded:
    """A tensor's numbers on the CPU; of a DTensor, those of this rank."""

    def __init__(self, t: Tensor):
        local = t.to_local() if isinstance(t, DTensor) else t
        self.device = t.device
        self.like = (t.device_mesh, t.placements, t.shape, t.stride()) if isinstance(t, DTensor) else None
        self.numbers = local.detach()
        if t.device.type != "cpu":
            # From pinned memory copies need not wait for each other: they follow the device's own order.
            pinned = t.device.type == "cuda"
            self.numbers = torch.empty(local.shape, dtype=local.dtype, pin_memory=pinned).copy_(local, non_blocking=pinned)


def back(saved: Tensor | Offloaded) -> Tensor:
    """What was saved, on its device."""
    if not isinstance(saved, Offloaded):
        return saved
    local = saved.numbers.to(saved.device, non_blocking=True)
    if saved.like is None:
        return local
    mesh, placements, shape, stride = saved.like
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def memory(t: Tensor) -> int:
    """Where a tensor's numbers are: the same for all views of the same memory."""
    return (t.to_local() if isinstance(t, DTensor) else t).untyped_storage().data_ptr()


@hookimpl
def nanopre_parallel(register):
    register("activation_offload", ActivationOffload)
