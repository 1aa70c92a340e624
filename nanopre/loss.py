"""Cross-entropy from hidden states: the largest tensor of pre-training, the logits, is never held whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""In an array of targets: this position has no target."""


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of h (N, C) @ weight.T (C, V) + bias (V) with targets (N,), in chunks of rows; and, with
    `count_correct`, of how many targets are the likeliest token.

    Each chunk's gradient is made while its logits are at hand, so that neither the (N, V) logits nor their gradient is
    ever held whole, and nothing is computed twice.
    """

    LOGITS_PER_CHUNK = 2**25  # 128 MiB in float32; with half as many a step of GPT-2 124M takes 3% longer on a CPU

    @staticmethod
    def forward(ctx, h, weight, bias, targets, count_correct) -> tuple[Tensor, Tensor]:
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        with torch.autocast(device, enabled=False):
            return LinearCrossEntropy._forward(ctx, h, weight, bias, targets, count_correct, dtype)

    @staticmethod
    def _forward(ctx, h, weight, bias, targets, count_correct: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with_gradient = any(ctx.needs_input_grad)
        w = weight.to(dtype)
        h_gradient = torch.empty_like(h) if with_gradient else None
        w_gradient = b_gradient = None
        total, correct = (torch.zeros((), device=h.device) for _ in range(2))  # no views, which FSDP would warn of
        rows = max(1, LinearCrossEntropy.LOGITS_PER_CHUNK // weight.shape[0])
        for h_part, t_part, g_part in zip(
            h.split(rows), targets.split(rows), h_gradient.split(rows) if with_gradient else h.split(rows), strict=True
        ):
            x = h_part.to(dtype)
            logits = (x @ w.T).float()  # (n, V)
            log_p = F.log_softmax(logits if bias is None else logits.add_(bias), dim=-1)
            has_target = (t_part != IGNORE).unsqueeze(1)
            index = t_part.clamp(min=0).unsqueeze(1)
            total += F.nll_loss(log_p, t_part, ignore_index=IGNORE, reduction="sum")
            if count_correct:
                correct += ((log_p.gather(1, index) >= log_p.amax(dim=1, keepdim=True)) & has_target).sum()
            if with_gradient:
                # d total / d logits = softmax - one_hot(target), and 0 without a target: where no bias asks for it here, C
                # numbers a row are masked below instead of these V.
                gradient = log_p.exp_()
                gradient.scatter_add_(1, index, -torch.ones_like(gradient[:, :1]))
                if bias is not None:
                    part = gradient.mul_(has_target).sum(dim=0)  # in place: a copy would be a third tensor of a chunk's size
                    b_gradient = part if b_gradient is None else b_gradient.add_(part)
                gradient = gradient.to(dtype)
                g_part.copy_((gradient @ w) * has_target)
                part = gradient.T @ (x * has_target)
                w_gradient = part.float() if w_gradient is None else w_gradient.add_(part)
        ctx.mark_non_differentiable(correct)
        if with_gradient:
            ctx.save_for_backward(h_gradient, w_gradient, b_gradient)
        return total, correct

    @staticmethod
    def backward(ctx, scale: Tensor, _) -> tuple:
        gradients = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return *gradients, None, None
