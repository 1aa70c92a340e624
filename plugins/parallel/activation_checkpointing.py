"""Activation checkpointing: what a block's forward pass leaves is dropped, and computed again in the backward pass."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from nanopre import hookimpl
from nanopre.parallel import Layout

aten = torch.ops.aten
KEPT = {
    *(aten.mm.default, aten.addmm.default),
    *(aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default),
    *(aten._scaled_dot_product_cudnn_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default),
}
"""What "selective" does not compute again: products with weights, and attention where one kernel does it all."""


@dataclass
class ActivationCheckpointing:
    """Blocks computed a second time in the backward pass (Chen et al., 2016), which leaves one stream a block to hold.

    "full" does so with the whole block: a third more work. "selective" keeps the outputs of the products with weights, which
    are most of the work, and computes the rest again: norms, activations, and attention's scores, which are most of the
    memory where no kernel fuses them (Korthikanti et al., 2022, section 5). Dropout drops the same both times.
    """

    mode: Literal["none", "selective", "full"] = "full"

    phase = "memory"

    def apply(self, parts: list[nn.Module], layout: Layout) -> list[nn.Module]:
        options = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if self.mode == "selective" else {}
        for part in parts if self.mode != "none" else ():
            for name, block in part.blocks.items():
                part.blocks[name] = checkpoint_wrapper(block, **options)
                if self.mode == "selective" and block._compiled_call_impl:
                    # A compiled block hides its products from the policy: so what is compiled is block and policy.
                    block._compiled_call_impl = None
                    part.blocks[name].compile()
        return parts


def policy(context, operator, *arguments, **options) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


@hookimpl
def nanopre_parallel(register):
    register("activation_checkpointing", ActivationCheckpointing)
