"""The T5 family of encoder-decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanopre import hookimpl
from nanopre.model import ModelConfig, Transformer


@dataclass
class T5:
    """T5 1.1 base (Raffel et al., 2020): relative positions, RMSNorm, no biases, gated GELU, untied embeddings."""

    d_model: int = 768
    n_layers: int = 12  # of the encoder
    n_decoder_layers: int = 0  # 0: n_layers
    n_heads: int = 12
    d_head: int = 64  # width of a head; 0: d_model / n_heads
    d_ff: int = 0  # inner width of the MLP; 0: 8/3 d_model up to a multiple of 64 where it is gated, else 4 * d_model
    activation: Literal["geglu_tanh", "relu"] = "geglu_tanh"  # relu: version 1.0
    tie_embeddings: bool = False  # version 1.0: tied, and logits scaled by d_model**-0.5
    relative_buckets: int = 32
    relative_distance: int = 128
    dropout: float = 0.0
    norm_eps: float = 1e-6
    vocab_size: int = 0  # rows of the embedding; 0: the tokenizer's vocabulary, rounded up to a multiple of 64

    def __post_init__(self):
        self.settings(vocab_size=1, seq_len=1)

    def settings(self, vocab_size: int, seq_len: int) -> ModelConfig:
        gated = -(-8 * self.d_model // (3 * 64)) * 64
        return ModelConfig(
            architecture="encoder-decoder",
            vocab_size=self.vocab_size or vocab_size,
            seq_len=seq_len,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_decoder_layers=self.n_decoder_layers or self.n_layers,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_head=self.d_head,
            d_ff=self.d_ff or (4 * self.d_model if self.activation == "relu" else gated),
            positions="relative",
            norm="rmsnorm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            bias=False,
            tie_embeddings=self.tie_embeddings,
            scale_attention=False,
            scale_logits=self.tie_embeddings,
            relative_buckets=self.relative_buckets,
            relative_distance=self.relative_distance,
            dropout=self.dropout,
        )

    def build(self, vocab_size: int, seq_len: int) -> Transformer:
        return Transformer(self.settings(vocab_size, seq_len))


@hookimpl
def nanopre_models(register):
    register("t5", T5)
