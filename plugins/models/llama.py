"""The LLaMA family: rotary positions, RMSNorm, SwiGLU, grouped-query attention."""

from __future__ import annotations

from dataclasses import dataclass

from nanopre import hookimpl
from nanopre.model import ModelConfig, Transformer


@dataclass
class Llama:
    """LLaMA (Touvron et al., 2023): rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases."""

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = 0  # heads of keys and values; 0: n_heads
    d_ff: int = 0  # inner width of the MLP; 0: 8/3 d_model (the cost of a plain MLP of 4 d_model), up to a multiple of 64
    qk_norm: bool = False  # RMSNorm of each head's queries and keys
    rope_theta: float = 10_000.0
    tie_embeddings: bool = False
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
            n_kv_heads=self.n_kv_heads or self.n_heads,
            d_ff=self.d_ff or -(-8 * self.d_model // (3 * 64)) * 64,
            positions="rope",
            norm="rmsnorm",
            norm_eps=self.norm_eps,
            activation="swiglu",
            bias=False,
            tie_embeddings=self.tie_embeddings,
            qk_norm=self.qk_norm,
            rope_theta=self.rope_theta,
            dropout=self.dropout,
            mup_base_width=self.mup_base_width,
        )

    def build(self, vocab_size: int, seq_len: int) -> Transformer:
        return Transformer(self.settings(vocab_size, seq_len))


@hookimpl
def nanopre_models(register):
    register("llama", Llama)
