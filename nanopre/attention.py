"""The arithmetic of attention: which keys a query sees, and the fastest way to the weighted sum of their values.

Shapes: B rows, H heads of queries, H_kv heads of keys and values, each shared by H / H_kv heads of queries, D their width, T
queries, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_A_TIME = 128  # of `AttendByProducts`


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    products: bool = False,
) -> Tensor:
    """softmax(scale * q @ k.T + bias) @ v (Vaswani et al., 2017, section 3.2.1) of queries (B, H, T, D) to keys and values
    (B, H_kv, S, D). Returns (B, H, T, D).

    causal: the queries are the last T of the S positions, and none sees a key behind its own.
    visible (B,), at least 1: of the first so many keys of its row every query sees each, behind it or not; a query that is
        not causal sees no others.
    bias (H, T, S) is added to the scores; scale: what the products are multiplied by, 1 / sqrt(D) if None.
    products: train with plain products, in place of torch's fused kernel.
    """
    T, S = q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if products and q.requires_grad:
        return AttendByProducts.apply(q, k, v, bias, visible, causal, scale, dropout)
    mask = None
    if visible is None and bias is None and (not causal or T == S or T == 1):
        hides_later_keys = causal and T > 1  # which the kernel does without a mask; a last query alone sees every key
    else:
        hides_later_keys = False
        hidden = hidden_keys(S - T, T, S, causal, visible, q.device)
        mask = None if hidden is None else ~hidden
        if bias is not None:
            mask = bias.to(q.dtype) if hidden is None else bias.to(q.dtype).masked_fill(hidden, float("-inf"))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        is_causal=hides_later_keys,
    )  # fmt: skip


class AttendByProducts(torch.autograd.Function):
    """`attend` in plain products, to train on a CPU: there the backward pass of scaled_dot_product_attention is the slowest
    part of a small model's step.

    Some queries at a time, so that half of the scores that causality hides are never made. The backward pass adds each
    part to the gradients in place, and both passes write the heads of a position side by side, as the projections read
    them: left to autograd, two and more parts take 1.3 to 1.5 times as long, 7% of a step.
    """

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        visible: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
    ) -> Tensor:
        (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
        n, group = B * H_kv, H // H_kv  # query heads that share keys and values: more queries of one head
        q, k, v = q.reshape(n, group, T, D), k.reshape(n, S, D), v.reshape(n, S, D)
        ctx.parts = parts_of_queries(T, S, causal and visible is None, QUERIES_AT_A_TIME)
        ctx.scale, ctx.dropout = scale, dropout
        out, kept = q.new_empty(B, T, H, D), []
        for start, end, seen in ctx.parts:
            t = end - start
            queries = q[:, :, start:end].reshape(n, group * t, D)
            scores = scaled_product(queries, k[:, :seen].mT, scale)
            by_head = scores.view(B, H, t, seen)
            if bias is not None:
                by_head += bias[:, start:end, :seen]
            first = S - T + start  # the key at the first of these queries: without `visible` none before it is hidden
            unhidden = first if visible is None else 0
            hidden = hidden_keys(first - unhidden, t, seen - unhidden, causal, visible, q.device)
            if hidden is not None:  # added: masked_fill_ takes three times as long
                by_head[..., unhidden:] += q.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            weights = scores.softmax(dim=-1).to(v.dtype)
            dropped, mask = torch.native_dropout(weights, dropout, True) if dropout else (None, None)
            out[:, start:end] = ((weights if dropped is None else dropped) @ v[:, :seen]).view(B, H, t, D).transpose(1, 2)
            kept += [weights, dropped, mask]
        ctx.save_for_backward(q, k, v, bias, *kept)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, out_gradient: Tensor) -> tuple:
        q, k, v, bias, *kept = ctx.saved_tensors
        (n, group, T, D), S, (B, H) = q.shape, k.shape[1], out_gradient.shape[:2]
        q_gradient, k_gradient, v_gradient = q.new_empty(B, T, H, D), torch.empty_like(k), torch.empty_like(v)
        bias_gradient = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        beta = 0  # the last queries see every key: their part begins the sums
        for start, end, seen in reversed(ctx.parts):
            t = end - start
            mask, dropped, weights = kept.pop(), kept.pop(), kept.pop()
            queries = q[:, :, start:end].reshape(n, group * t, D)
            gradient = out_gradient[:, :, start:end].reshape(n, group * t, D)
            v_gradient[:, :seen].baddbmm_((weights if dropped is None else dropped).mT, gradient, beta=beta)
            gradient = gradient @ v[:, :seen].mT
            if mask is not None:
                gradient = torch.ops.aten.native_dropout_backward(gradient, mask, 1 / (1 - ctx.dropout))
            gradient = torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)
            if bias_gradient is not None:
                bias_gradient[:, start:end, :seen] = gradient.view(B, H, t, seen).sum(dim=0, dtype=bias.dtype)
            q_part = scaled_product(gradient, k[:, :seen], ctx.scale)
            q_gradient[:, start:end] = q_part.view(B, H, t, D).transpose(1, 2)
            k_gradient[:, :seen].baddbmm_(gradient.mT, queries, beta=beta, alpha=ctx.scale)
            beta = 1
        H_kv = n // B
        return (
            q_gradient.transpose(1, 2), k_gradient.view(B, H_kv, S, D), v_gradient.view(B, H_kv, S, D), bias_gradient,
            None, None, None, None,
        )  # fmt: skip


def parts_of_queries(T: int, S: int, causal: bool, size: int) -> list[tuple[int, int, int]]:
    """(first, end, keys that any of them sees) of each part of T queries, `size` at most, which are the last of S
    positions."""
    starts = range(0, T, size)
    ends = [min(start + size, T) for start in starts]
    return [(start, end, S - T + end if causal else S) for start, end in zip(starts, ends, strict=True)]


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b of batches of matrices, in one operation."""
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def hidden_keys(first: int, T: int, S: int, causal: bool, visible: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of S keys each of the queries at positions first .. first + T - 1 must not see, as `attend` says: (T, S),
    (B, 1, 1, S) or (B, 1, T, S); None where it sees all."""
    hidden = torch.ones(T, S, dtype=torch.bool, device=device).triu(first + 1) if causal else None
    if visible is not None:
        beyond = (torch.arange(S, device=device) >= visible[:, None])[:, None, None, :]
        hidden = beyond if hidden is None else hidden & beyond
    return hidden
