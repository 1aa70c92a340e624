"""The GPT-2 family: learned positions, LayerNorm, GELU, biases, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanopre import hookimpl
from nanopre.model import ModelConfig, Transformer


@dataclass
class GPT2:
    """GPT-2 (Radford et al., 2019): learned positions, LayerNorm, GELU, biases, tied embeddings."""

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    d_ff: int = 0  # inner width of the MLP; 0: 4 * d_model
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"  # "gelu": by the error function, as nanoGPT has it
    bias: bool = True  # in linear layers and LayerNorms
    tie_embeddings: bool = True
    dropout: float = 0.0
    norm_eps: float = 1e-5
    mup_base_width: int = 0  # d_model at which optimizer.lr was found, which muP carries over to this one; 0: no muP
    vocab_size: int = 0  # rows of the embedding; 0: the tokenizer's vocabulary, rounded up to a multiple of 64

    def __post_init__(self):
        self.settings(vocab_size=1, seq_len=1)

    def settings(self, vocab_size: int, seq_len: int) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab_size or vocab_size,
            seq_len=seq_len,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_ff=self.d_ff or 4 * self.d_model,
            positions="learned",
            norm="layernorm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            bias=self.bias,
            tie_embeddings=self.tie_embeddings,
            dropout=self.dropout,
            mup_base_width=self.mup_base_width,
        )

    def build(self, vocab_size: int, seq_len: int) -> Transformer:
        return Transformer(self.settings(vocab_size, seq_len))


@hookimpl
def nanopre_models(register):
    register("gpt2", GPT2)
