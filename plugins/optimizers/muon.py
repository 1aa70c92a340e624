"""Muon: momentum whose matrix is orthogonalised by a Newton-Schulz iteration; AdamW for all that is no block matrix."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nanopre import hookimpl
from nanopre.config import at_least, below_one
from nanopre.machine import has_fast_bfloat16
from nanopre.optim import split_parameters


@dataclass
class Muon:
    """Muon for the blocks' matrices (Jordan et al., 2024), AdamW for embeddings, output projection, norms and biases."""

    lr: float = 2e-3  # peak, of the matrices; updates have AdamW's size, so that AdamW's rates and decay carry over
    momentum: float = 0.95
    weight_decay: float = 0.1
    adamw_lr: float = 0.0  # peak, of all the rest; 0: lr
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    mup = True

    def __post_init__(self):
        at_least(self, lr=0, adamw_lr=0, eps=0, weight_decay=0)
        below_one(self, "momentum", "beta1", "beta2")

    def state_bytes(self, kind: str, n: float) -> float:
        return 4 * n if kind == "matrix" else 8 * n

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices, ends, vectors = split_parameters(model)
        rest = [{"params": ends, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        betas = (self.beta1, self.beta2)
        # With muP an update's spectral norm must not grow with the width (Yang et al., 2023, condition 1); scaled by
        # sqrt(max(rows, columns)) it does, with the root, and so the rate falls with it. What decay takes off stays.
        factor = model.config.width_ratio**-0.5
        adamw = torch.optim.AdamW(
            [g for g in rest if g["params"]], self.adamw_lr or self.lr, betas, self.eps, fused=True
        )
        return [MuonOptimizer(matrices, self.lr * factor, self.momentum, self.weight_decay / factor), adamw]


class MuonOptimizer(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for 2D parameters; decoupled weight decay.

    An update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the root mean square of AdamW's updates
    (Liu et al., 2025, section 2.2). torch.optim.Muon does the same one matrix at a time; here the matrices of one shape
    go through the iteration together, which for small models is most of the optimizer's time.
    """

    def __init__(self, params, lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for params in shapes.values():
                self._step(params, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, buffers, momentum)
        # The iteration needs whole matrices: where ranks hold parts, each gathers all and keeps its part of the update.
        whole = [d.full_tensor() if isinstance(d, DTensor) else d for d in directions]
        updates = list(orthogonalise(torch.stack(whole)).to(params[0].dtype).unbind())
        if isinstance(params[0], DTensor):
            updates = [
                distribute_tensor(u, p.device_mesh, p.placements, src_data_rank=None)
                for u, p in zip(updates, params, strict=True)
            ]
        scale = 0.2 * max(params[0].shape) ** 0.5
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr * scale)


def orthogonalise(g: Tensor) -> Tensor:
    """A batch (n, rows, columns) of matrices U S V^T to about U V^T: five steps of the quintic Newton-Schulz iteration
    with the coefficients of Jordan et al. (2024), which bring every singular value to between 0.7 and 1.2."""
    x = g.bfloat16() if has_fast_bfloat16(g.device) else g.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


@hookimpl
def nanopre_optimizers(register):
    register("muon", Muon)
