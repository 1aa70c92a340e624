"""The BERT family of encoders, and its modern successor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanopre import hookimpl
from nanopre.model import ModelConfig, Transformer


@dataclass
class BERT:
    """BERT-base (Devlin et al., 2019): learned positions, segments, norms after the sums, GELU; bert-large is 1024 x 24."""

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    d_ff: int = 0  # inner width of the MLP; 0: 4 * d_model
    positions: Literal["learned", "rope"] = "learned"  # small models learn several times faster with rope
    dropout: float = 0.0
    norm_eps: float = 1e-12
    vocab_size: int = 0  # rows of the embedding; 0: the tokenizer's vocabulary, rounded up to a multiple of 64

    def __post_init__(self):
        self.settings(vocab_size=1, seq_len=1)

    def settings(self, vocab_size: int, seq_len: int) -> ModelConfig:
        return encoder(
            self,
            vocab_size,
            seq_len,
            d_ff=self.d_ff or 4 * self.d_model,
            positions=self.positions,
            post_norm=True,
            activation="gelu",
            bias=True,
        )

    def build(self, vocab_size: int, seq_len: int) -> Transformer:
        return Transformer(self.settings(vocab_size, seq_len))


@dataclass
class ModernEncoder:
    """An encoder as it is built today (Warner et al., 2024): rotary positions, norms before the layers, GeGLU, no biases."""

    d_model: int = 768
    n_layers: int = 22
    n_heads: int = 12
    d_ff: int = 0  # inner width of the MLP; 0: 3/2 d_model
    rope_theta: float = 10_000.0
    dropout: float = 0.0
    norm_eps: float = 1e-5
    vocab_size: int = 0  # rows of the embedding; 0: the tokenizer's vocabulary, rounded up to a multiple of 64

    def __post_init__(self):
        self.settings(vocab_size=1, seq_len=1)

    def settings(self, vocab_size: int, seq_len: int) -> ModelConfig:
        return encoder(
            self,
            vocab_size,
            seq_len,
            d_ff=self.d_ff or 3 * self.d_model // 2,
            positions="rope",
            activation="geglu",
            bias=False,
            rope_theta=self.rope_theta,
        )

    def build(self, vocab_size: int, seq_len: int) -> Transformer:
        return Transformer(self.settings(vocab_size, seq_len))


def encoder(options, vocab_size: int, seq_len: int, **others) -> ModelConfig:
    """The settings of either family: those that both have, sizes from the family's options, and `others`."""
    return ModelConfig(
        architecture="encoder",
        vocab_size=options.vocab_size or vocab_size,
        seq_len=seq_len,
        d_model=options.d_model,
        n_layers=options.n_layers,
        n_heads=options.n_heads,
        n_kv_heads=options.n_heads,
        norm="layernorm",
        norm_eps=options.norm_eps,
        embedding_norm=True,
        n_segments=2,
        transform=True,
        tie_embeddings=True,
        dropout=options.dropout,
        **others,
    )


@hookimpl
def nanopre_models(register):
    register("bert", BERT)
    register("modern_encoder", ModernEncoder)
