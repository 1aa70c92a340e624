"""AdamW, PyTorch's fused one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nanopre import hookimpl
from nanopre.config import at_least, below_one
from nanopre.optim import split_parameters


@dataclass
class AdamW:
    """AdamW with decay on matrices and embeddings only (Loshchilov and Hutter, 2019)."""

    lr: float = 3e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self):
        at_least(self, lr=0, eps=0, weight_decay=0)
        below_one(self, "beta1", "beta2")

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices, ends, vectors = split_parameters(model)
        groups = [
            {"params": matrices + ends, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (self.beta1, self.beta2)
        return [torch.optim.AdamW([g for g in groups if g["params"]], self.lr, betas, self.eps, fused=True)]


@hookimpl
def nanopre_optimizers(register):
    register("adamw", AdamW)
