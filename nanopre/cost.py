"""Parameters and FLOPs of a model, and the peak of a device: what `train.py` needs to state the MFU."""

from __future__ import annotations

import torch

from nanopre.model import ModelConfig

# Dense bfloat16 products, FLOP/s, from the makers' data sheets (NVIDIA: A100 2020, H100/H200 2023, L4/L40S 2023, B200 2024).
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device, precision: torch.dtype) -> float | None:
    """The device's peak of bfloat16 products in FLOP/s, None where it is not known (CPUs) or not what runs (float32)."""
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    matches = [known for known in PEAK_FLOPS if known in name]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def parameters(config: ModelConfig) -> dict[str, int]:
    """How many parameters: "embedding" (tokens and learned positions), "blocks" (with the last norm), "head" (the output
    projection, 0 where it is the token embedding), and "total"."""
    C, kv = config.d_model, config.n_kv_heads * config.head_dim
    gates = 3 if config.activation == "swiglu" else 2
    norm = 2 * C if config.norm == "layernorm" and config.bias else C
    block = 2 * C * C + 2 * C * kv + gates * C * config.d_ff + 2 * norm
    if config.bias:
        block += 2 * C + 2 * kv + (gates - 1) * config.d_ff + C
    if config.qk_norm:
        block += 2 * config.head_dim
    parts = {
        "embedding": config.vocab_size * C + (config.seq_len * C if config.positions == "learned" else 0),
        "blocks": config.n_layers * block + norm,
        "head": 0 if config.tie_embeddings else config.vocab_size * C,
    }
    return {**parts, "total": sum(parts.values())}


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of one token's forward and backward pass: 6 N + 12 L H Q T (Chowdhery et al., 2022, appendix B), where N
    counts the parameters that are multiplied: all but a lookup-only embedding. The convention counts attention as if
    it were not causal."""
    parts = parameters(config)
    multiplied = parts["blocks"] + config.vocab_size * config.d_model
    return 6 * multiplied + 12 * config.n_layers * config.d_model * seq_len
