"""Which parameter is what to an optimizer, and how the learning rate runs. The optimizers are plugins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanopre import UserError
from nanopre.config import Schedule


def split_parameters(model: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(matrices of the blocks, embeddings and output projection, vectors) among the parameters that are trained.

    Vectors, which are norms and biases, are not decayed; Muon is for the blocks' matrices alone (Jordan et al., 2024).
    """
    matrices, ends, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = vectors if parameter.dim() < 2 else matrices if "blocks." in name else ends
            kind.append(parameter)
    return matrices, ends, vectors


def adamw_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict]:
    """Parameter groups of an AdamW: decay on matrices and embeddings, none on vectors; and with muP a rate for the blocks'
    matrices that falls with their width (Yang et al., 2022, table 8, Adam), while what decay takes off in a step, lr times
    weight_decay, stays."""
    matrices, ends, vectors = split_parameters(model)
    ratio = model.config.width_ratio
    groups = [
        {"params": matrices + ends, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]
    if ratio != 1:
        groups[0]["params"] = ends
        groups.append({"params": matrices, "lr": lr / ratio, "weight_decay": weight_decay * ratio})
    return [group for group in groups if group["params"]]


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """What the peak learning rate is multiplied by in step 0 .. steps-1: a linear warm-up, then the schedule's shape,
    which ends at `min_lr_ratio`. "wsd" (warmup-stable-decay; Hu et al., 2024, section 4) stays at the peak until the
    last `decay_fraction` of the run and then falls linearly.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    after = step - schedule.warmup_steps  # steps since the warm-up
    left = max(1, steps - schedule.warmup_steps)  # of so many
    match schedule.name:
        case "constant":
            return 1.0
        case "linear":
            height = 1 - after / left
        case "cosine":
            height = 0.5 * (1 + math.cos(math.pi * min(1.0, after / left)))
        case "wsd":
            height = min(1.0, (steps - step) / max(1.0, schedule.decay_fraction * steps))
    return schedule.min_lr_ratio + (1 - schedule.min_lr_ratio) * max(0.0, height)


def build(plugin: Any, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers of the configured plugin. Raises UserError where its build gives anything else, or where it is not
    made for bfloat16 weights or muP."""
    optimizers = plugin.build(model)
    is_list = isinstance(optimizers, (list, tuple)) and optimizers
    if not (is_list and all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers)):
        given = " ".join(repr(optimizers).split())[:80]
        raise UserError(
            f'optimizer: the build of "{plugin._plugin_name}" gave {given}; it must give a list of torch.optim.Optimizer.'
        )
    if model.config.mup_base_width and not getattr(plugin, "mup", False):
        raise UserError(
            f'model.mup_base_width: optimizer "{plugin._plugin_name}" has no rule for muP\'s learning rates; take "adamw".'
        )
    if any(p.dtype == torch.bfloat16 for p in model.parameters()) and "bfloat16" not in getattr(plugin, "weights", ()):
        raise UserError(
            f'train.weights = bfloat16: optimizer "{plugin._plugin_name}" would lose small updates of them; take "adamw".'
        )
    for optimizer in optimizers:
        groups = optimizer.param_groups
        optimizer.param_groups = [{**group, "params": part} for group in groups for part in _by_mesh(group["params"])]
    return list(optimizers)


def _by_mesh(parameters: list[Tensor]) -> list[list[Tensor]]:
    """The parameters, apart by the mesh that they are split over: fused and foreach kernels take those of one mesh."""
    groups: dict[object, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(getattr(p, "device_mesh", None), []).append(p)
    return list(groups.values())


def peak_rates(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[float]]:
    """The learning rates that the config asked for, one a parameter group, to be read before a checkpoint is loaded."""
    return [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]


def set_rates(optimizers: Sequence[torch.optim.Optimizer], peaks: list[list[float]], factor: float) -> None:
    """Give each parameter group its peak learning rate times `factor`."""
    for optimizer, rates in zip(optimizers, peaks, strict=True):
        for group, peak in zip(optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # of an optimizer that is compiled
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor
