"""The arithmetic of attention: which keys a query sees, and the fastest way to the weighted sum of their values.

Shapes: B rows, H heads of queries, H_kv heads of keys and values, each shared by H / H_kv heads of queries, D their width, T
queries, S keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_A_TIME = 128  # of `attend_by_products`


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
        return attend_by_products(q, k, v, causal, visible, bias, scale, dropout)
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


def attend_by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """`attend` in plain products, to train on a CPU: there the backward pass of scaled_dot_product_attention is the slowest
    part of a small model's step.

    Some queries at a time, so that half of the scores that causality hides are never made. What is added to the scores
    goes into the product as where its sums begin, which no backward pass visits: masked_fill instead, and queries that are
    scaled before, take 1.2 to 1.45 times attention's time, 4% of a step.
    """
    (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
    group = H // H_kv  # query heads that share keys and values: more queries of one head
    q = q.reshape(B * H_kv, group, T, D)
    k, v = k.reshape(B * H_kv, S, D), v.reshape(B * H_kv, S, D)
    parts = []
    for start in range(0, T, QUERIES_AT_A_TIME):
        t = min(QUERIES_AT_A_TIME, T - start)
        seen = S - T + start + t if causal and visible is None else S
        added = q.new_zeros(()) if bias is None else bias[:, start : start + t, :seen].to(q.dtype)
        hidden = hidden_keys(S - T + start, t, seen, causal, visible, q.device)
        if hidden is not None:
            added = added.masked_fill(hidden, float("-inf"))  # (t, seen), (H, t, seen) or (B, 1 or H, 1 or t, seen)
        if added.dim() > 2 or added.dim() and group > 1:
            added = added.expand(B, H, t, seen).reshape(B * H_kv, group * t, seen)
        queries = q[:, :, start : start + t].reshape(B * H_kv, group * t, D)
        beta = min(1, added.dim())  # 0: nothing is added
        scores = torch.baddbmm(added, queries, k[:, :seen].mT, beta=beta, alpha=scale)  # (B * H_kv, group * t, seen)
        weights = F.dropout(scores.softmax(dim=-1), dropout).to(v.dtype)
        parts.append((weights @ v[:, :seen]).view(B, H, t, D))
    return torch.cat(parts, dim=-2)


def hidden_keys(first: int, T: int, S: int, causal: bool, visible: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of S keys each of the queries at positions first .. first + T - 1 must not see, as `attend` says: (T, S),
    (B, 1, 1, S) or (B, 1, T, S); None where it sees all."""
    hidden = torch.ones(T, S, dtype=torch.bool, device=device).triu(first + 1) if causal else None
    if visible is not None:
        beyond = (torch.arange(S, device=device) >= visible[:, None])[:, None, None, :]
        hidden = beyond if hidden is None else hidden & beyond
    return hidden
