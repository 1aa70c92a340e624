"""AdamW with states of 8 bits: torchao's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nanopre import UserError, hookimpl
from nanopre.config import at_least, below_one
from nanopre.optim import adamw_groups


@dataclass
class AdamW8bit:
    """AdamW whose two moments have 8 bits a number, in blocks of 256 with a scale each (Dettmers et al., 2022).

    Tensors of fewer than 4,096 numbers, or not a multiple of 256, keep float32, as in the paper. The update itself is
    computed in float32, by a kernel that torch compiles: on a CPU this needs a C++ compiler.
    """

    lr: float = 3e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    mup = True

    def __post_init__(self):
        at_least(self, lr=0, eps=0, weight_decay=0)
        below_one(self, "beta1", "beta2")

    def state_bytes(self, kind: str, n: float) -> float:
        return 2 * (n + n / 256 * 4) if kind != "vector" and n >= 4096 else 8 * n  # a scale a block of 256

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        try:
            from torchao.optim import AdamW8bit as TorchAO
        except ImportError as error:
            raise UserError(
                f"optimizer.name = adamw8bit needs torchao, which can't be imported here ({error}): "
                "pip install 'nanopre[8bit]', or take \"adamw\"."
            ) from None
        groups = adamw_groups(model, self.lr, self.weight_decay)
        optimizer = TorchAO(groups, self.lr, (self.beta1, self.beta2), self.eps)
        try:  # the kernel, on a parameter of its own: where it does not work, the run stops here
            p = nn.Parameter(torch.zeros(4096, device=next(model.parameters()).device))
            p.grad = torch.zeros_like(p)
            TorchAO([p]).step()
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f'optimizer.name = adamw8bit does not work on this device, "{p.device}" ({reason}): take "adamw".'
            ) from error
        return [optimizer]


@hookimpl
def nanopre_optimizers(register):
    register("adamw8bit", AdamW8bit)
