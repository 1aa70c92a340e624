"""One Transformer for every architecture: settings choose the norm, the positions, the attention and the MLP.

The model comes apart in three places, `embed`, `blocks` and `head`, so that a strategy can split it from outside; nothing
in this file knows of devices or ranks. Shapes: B rows (sequences), T positions, C = d_model, H heads of width D, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""In an array of targets: this position has no target."""


@dataclass(frozen=True)
class ModelConfig:
    """The settings of a Transformer. GPT-2 and LLaMA are two choices of them (plugins/models/)."""

    vocab_size: int
    seq_len: int  # longest sequence, in tokens
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # heads of the keys and values; n_heads / n_kv_heads queries share each (Ainslie et al., 2023)
    d_ff: int  # inner width of the MLP
    positions: Literal["learned", "rope"]
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    activation: Literal["gelu", "gelu_tanh", "swiglu"]
    bias: bool  # in the linear layers and LayerNorms
    tie_embeddings: bool  # the output projection is the token embedding
    qk_norm: bool = False  # RMSNorm of each head's queries and keys (Henry et al., 2020)
    rope_theta: float = 10_000.0
    dropout: float = 0.0

    def __post_init__(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"d_model / n_heads = {self.head_dim} must be even for rotary positions")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (Zhang and Sennrich, 2019), in x's precision, for which torch has one fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, eps=config.norm_eps)


def cast_for_products(h: Tensor) -> Tensor:
    """Under autocast, h in its precision: once here instead of once in each projection that reads h."""
    device = h.device.type
    return h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def rotary_table(length: int, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of rotary positions, (2, length, head_dim / 2) (Su et al., 2021, section 3.2.2)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of (B, H, T, D) by their position's angles, from a table of (2, T, D/2)."""
    cos, sin = table.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention of T queries (B, H, T, D) to S >= T keys and values (B, H_kv, S, D): the last T of the S positions
    are the queries' own. Returns (B, H, T, D)."""
    (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
    if q.device.type != "cpu" or not q.requires_grad:
        mask = None if T == S or T == 1 else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=T == S and T > 1, enable_gqa=H != H_kv
        )
    # On a CPU the backward pass of scaled_dot_product_attention is the slowest part of a small model's step. Plain
    # products are faster, over 128 queries at a time so that half of the scores that causality hides are never made.
    q = (q * D**-0.5).reshape(B, H_kv, H // H_kv, T, D)
    k, v = k.unsqueeze(2), v.unsqueeze(2)  # (B, H_kv, 1, S, D), for every query head of the group
    parts = []
    for start in range(0, T, 128):
        end = min(start + 128, T)
        seen = S - T + end
        scores = q[..., start:end, :] @ k[..., :seen, :].transpose(-2, -1)  # (B, H_kv, H / H_kv, <=128, seen)
        hidden = torch.ones(end - start, seen, dtype=torch.bool, device=q.device).triu(S - T + start + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        parts.append(F.dropout(weights, dropout).to(v.dtype) @ v[..., :seen, :])
    return torch.cat(parts, dim=-2).reshape(B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention with separate query, key, value and output projections, each of which splits by heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        kv_width = config.n_kv_heads * config.head_dim
        self.q = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.k = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.v = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.out = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        rope = rotary_table(config.seq_len, config.head_dim, config.rope_theta) if config.positions == "rope" else None
        self.register_buffer("rope", rope, persistent=False)

    def forward(self, h: Tensor, cache=None) -> Tensor:
        B, T, _ = h.shape
        h = cast_for_products(h)
        # The number of heads is left to view(): where a strategy has split the projections, fewer are here.
        q = self.q_norm(self.q(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k(h).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v(h).view(B, T, -1, self.head_dim).transpose(1, 2)
        if self.rope is not None:
            start = 0 if cache is None else cache.length
            table = self.rope[:, start : start + T]
            q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, H_kv, S, D)
        a = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.out(a.transpose(1, 2).reshape(B, T, -1))


# ---------------------------------------------------------------------------------------------------------------------
# MLP and block


class MLP(nn.Module):
    """GPT-2's down(gelu(up(h))), or the gated down(silu(gate(h)) * up(h)) of Shazeer (2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if config.activation == "swiglu" else None
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, h: Tensor) -> Tensor:
        h = cast_for_products(h)
        if self.gate is None:
            return self.down(F.gelu(self.up(h), approximate=self.approximate))
        return self.down(F.silu(self.gate(h)) * self.up(h))


class Block(nn.Module):
    """Pre-norm residual block. Takes the stream (B, T, C), gives back the stream as a tuple: what flows from block to
    block is a tuple of tensors, and a block ignores the tensors of the batch that it does not need."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config), Attention(config)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h: Tensor, cache=None, **_) -> tuple[Tensor]:
        h = h + self.dropout(self.attn(self.attn_norm(h), cache))
        h = h + self.dropout(self.mlp(self.mlp_norm(h)))
        return (h,)


# ---------------------------------------------------------------------------------------------------------------------
# The two ends, and the loss


class Embedding(nn.Module):
    """Token ids (B, T) to the stream (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.seq_len, config.d_model) if learned else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, cache=None, **_) -> tuple[Tensor]:
        h = self.tokens(tokens)
        if self.positions is not None:
            start = 0 if cache is None else cache.length
            h = h + self.positions.weight[start : start + tokens.shape[1]]
        return (self.dropout(h),)


class Head(nn.Module):
    """The last norm, then either logits or, with `loss`, what that function makes of the normed stream.

    An objective's `loss(head, h, batch)` calls `head.cross_entropy`, so that it decides which positions meet the
    vocabulary, and the logits of a whole batch are never held.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = make_norm(config)
        self.proj = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, h: Tensor, loss: Callable | None = None, **batch) -> Tensor | dict[str, Tensor]:
        h = self.norm(h)
        return self.proj(h) if loss is None else loss(self, h, batch)

    def cross_entropy(self, h: Tensor, targets: Tensor) -> Tensor:
        """Sum over the targets of -log p(target), in nats, as a float32 scalar. h (..., C) and targets (...); a target
        of IGNORE counts nothing."""
        # no_grad does not reach a Function's needs_input_grad: a parameter would have an evaluation make its gradient.
        weight = self.proj.weight if torch.is_grad_enabled() else self.proj.weight.detach()
        return LinearCrossEntropy.apply(h.reshape(-1, h.shape[-1]), weight, targets.reshape(-1))


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of h (N, C) @ weight.T (C, V) with targets (N,), in chunks of rows.

    Each chunk's gradient is made while its logits are at hand, so that neither the (N, V) logits nor their gradient is
    ever held whole, and nothing is computed twice.
    """

    LOGITS_PER_CHUNK = 2**24  # 64 MiB in float32; large enough that the products run at full speed

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        with torch.autocast(device, enabled=False):
            return LinearCrossEntropy._forward(ctx, h, weight, targets, dtype)

    @staticmethod
    def _forward(ctx, h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        w = weight.to(dtype)
        h_gradient = torch.empty_like(h) if with_gradient else None
        w_gradient = torch.zeros_like(weight) if with_gradient else None
        total = h.new_zeros((), dtype=torch.float32)
        rows = max(1, LinearCrossEntropy.LOGITS_PER_CHUNK // weight.shape[0])
        for h_part, t_part, g_part in zip(
            h.split(rows), targets.split(rows), h_gradient.split(rows) if with_gradient else h.split(rows), strict=True
        ):
            x = h_part.to(dtype)
            log_p = F.log_softmax((x @ w.T).float(), dim=-1)  # (n, V)
            total += F.nll_loss(log_p, t_part, ignore_index=IGNORE, reduction="sum")
            if with_gradient:
                gradient = log_p.exp_()  # d total / d logits = softmax - one_hot(target), 0 without a target
                has_target = (t_part != IGNORE).unsqueeze(1)
                gradient.scatter_add_(1, t_part.clamp(min=0).unsqueeze(1), -torch.ones_like(gradient[:, :1]))
                gradient = gradient.mul_(has_target).to(dtype)
                g_part.copy_(gradient @ w)
                w_gradient += gradient.T @ x
        if with_gradient:
            ctx.save_for_backward(h_gradient, w_gradient)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, Tensor, None]:
        h_gradient, w_gradient = ctx.saved_tensors
        return h_gradient * scale.to(h_gradient.dtype), w_gradient * scale.to(w_gradient.dtype), None


class Transformer(nn.Module):
    """`embed`, then `blocks`, then `head`. The blocks' keys "0", "1", ... keep the parameters' names when a strategy
    leaves some of them out."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.blocks = nn.ModuleDict({str(i): Block(config) for i in range(config.n_layers)})
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.proj.weight = self.embed.tokens.weight

    def forward(self, tokens: Tensor, loss: Callable | None = None, cache=None, **batch) -> Tensor | dict[str, Tensor]:
        """tokens (B, T), T <= seq_len, to logits (B, T, V); with `loss`, to that function's sums. `batch`: the batch's
        other tensors. `cache`: keys and values of earlier positions (nanopre.generate.KeyValueCache)."""
        state = self.embed(tokens, cache=cache, **batch)
        for name, block in self.blocks.items():
            state = block(*state, cache=None if cache is None else cache[name], **batch)
        return self.head(*state, loss=loss, **batch)

    def init_std(self, name: str) -> float | None:
        """Standard deviation of a weight at the start; None: a norm's weight (1) or a bias (0).

        GPT-2's rule (Radford et al., 2019, section 2.3): 0.02, and less for the matrices that write to the residual
        stream, so that its variance does not grow with the depth.
        """
        if name.endswith(".bias") or "norm." in name:
            return None
        residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
        return 0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02
