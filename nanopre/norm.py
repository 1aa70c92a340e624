"""The two norms, in the precision of what they are given, whatever their weights have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / deviation(x) * weight + bias over the last dimension (Ba et al., 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        # torch has one kernel for it on a GPU, and parts on a CPU. Those also take DTensors, whose type is not Tensor.
        if x.device.type == "cpu" and type(x) is Tensor and x.requires_grad:
            return RMSNormOnCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm in as few passes over x as torch's operations allow, computed in float32. It takes 0.4 to 0.5 of the time
    of F.rms_norm there, forward and backward, 6% of a T5's step, and keeps nothing but x and a number for each row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        C, g, w = x.shape[-1], gradient.float(), weight.float()
        product = g * x
        rows = product.reshape(-1, C)
        weight_gradient = rows.T @ inverse.reshape(-1)
        along_x = (rows @ w).view(inverse.shape)
        x_gradient = torch.mul(g, w, out=product).mul_(inverse)
        x_gradient.addcmul_(x, along_x.mul_(inverse**3).div_(-C))
        return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype), None
