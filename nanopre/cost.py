"""Parameters and FLOPs of a model, and the peak of a device: what `train.py` needs to state the MFU."""

from __future__ import annotations

import torch
from torch import Tensor

from nanopre import accelerators
from nanopre.model import GATED, ModelConfig


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """The device's peak of bfloat16 products in FLOP/s, None where it is not known (CPUs) or not what runs (float32)."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    known = accelerators.of_device(torch.cuda.get_device_name(device))
    return known.peak_flops if known else None


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters: "embedding" (tokens, learned positions, segments and their norm), "blocks" (with the biases of
    relative positions and the last norms), "head" (the output projection, 0 where it is the token embedding, and what
    comes with it), and "total". What an objective adds to the model is not among them."""
    C, H, V, n_decoder = config.d_model, config.n_heads, config.vocab_size, config.n_decoder_layers
    norm = 2 * C if config.norm == "layernorm" and config.bias else C
    attention = sum(_attention_products(config))
    mlp = _mlp_products(config)
    if config.bias:
        attention += H * config.head_dim + 2 * config.n_kv_heads * config.head_dim + C
        mlp += _mlp_products(config) // C - config.d_ff + C
    if config.qk_norm:
        attention += 2 * config.head_dim
    blocks = config.n_layers * (attention + mlp + 2 * norm) + n_decoder * (2 * attention + mlp + 3 * norm)
    stacks = 2 if config.architecture == "encoder-decoder" else 1
    if config.positions == "relative":
        blocks += stacks * config.relative_buckets * H
    blocks += (stacks - 1) * norm + (0 if config.post_norm else norm)
    rows = V + config.n_segments + (config.seq_len if config.positions == "learned" else 0)
    parts = {
        "embedding": rows * C + (norm if config.embedding_norm else 0),
        "blocks": blocks,
        "head": (0 if config.tie_embeddings else V * C) + (C * C + C + norm + V if config.transform else 0),
    }
    return {**parts, "total": sum(parts.values())}


def _attention_products(config: ModelConfig) -> tuple[int, int]:
    """Weights that multiply the tokens which ask (queries and output), and those which answer (keys and values)."""
    return (2 * config.d_model * config.n_heads * config.head_dim, 2 * config.d_model * config.n_kv_heads * config.head_dim)


def _mlp_products(config: ModelConfig) -> int:
    return (3 if config.activation in GATED else 2) * config.d_model * config.d_ff


def flops_per_token(config: ModelConfig, seq_len: int, decoder_len: int = 0, scored: int | None = None) -> float:
    """FLOPs of one token's forward and backward pass: 6 N + 12 L H Q T (Chowdhery et al., 2022, appendix B), where N
    counts the weights that tokens are multiplied with. The convention counts attention as if it were not causal.

    decoder_len: of an encoder-decoder the decoder's tokens beside `seq_len` of the encoder. A row's FLOPs, the decoder's
        among them, are then shared out over the encoder's tokens.
    scored: positions a row that meet the vocabulary; None: every one (of the decoder).
    """
    blocks, head = row_flops(config, seq_len, decoder_len, scored)
    return (sum(blocks) + head) / seq_len


def row_flops(
    config: ModelConfig, seq_len: int, decoder_len: int = 0, scored: int | None = None
) -> tuple[list[float], float]:
    """FLOPs of a row's forward and backward pass in each block, and in the head. Arguments as of flops_per_token."""
    T, D, width = seq_len, decoder_len, config.n_heads * config.head_dim
    asks, answers = _attention_products(config)
    mlp = _mlp_products(config)
    # Multiplications of a row in one forward pass: each costs an addition too, and two more of both in the backward pass.
    encoder = T * (asks + answers + mlp + 2 * width * T)
    decoder = D * (2 * asks + answers + mlp + 2 * width * (D + T)) + T * answers
    if scored is None:
        scored = D if config.architecture == "encoder-decoder" else T
    head = scored * (config.vocab_size * config.d_model + (config.d_model**2 if config.transform else 0))
    return [6 * encoder] * config.n_layers + [6 * decoder] * config.n_decoder_layers, 6 * head


def flops(config: ModelConfig, batch: dict[str, Tensor]) -> float:
    """FLOPs of a forward and backward pass over a batch: its widths tell how many tokens a row has, how many its decoder
    has, and how many positions meet the vocabulary."""
    blocks, head = batch_flops(config, batch)
    return sum(blocks) + head


def batch_flops(config: ModelConfig, batch: dict[str, Tensor]) -> tuple[list[float], float]:
    """The same for each block, and for the head."""
    B, T = batch["tokens"].shape
    decoder_len = batch["decoder_tokens"].shape[1] if "decoder_tokens" in batch else 0
    scored = batch["positions"].shape[1] if "positions" in batch else None
    blocks, head = row_flops(config, T, decoder_len, scored)
    return [B * block for block in blocks], B * head
