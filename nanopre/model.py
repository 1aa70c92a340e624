"""The Transformer in its three architectures: decoder (GPT-2, LLaMA), encoder (BERT), encoder-decoder (T5).

    tokens (B, T) -> embed -> stream (B, T, C) -> blocks "0", "1", ... -> stream -> head -> logits (B, T, V), or losses

Of an encoder-decoder two streams go through the blocks side by side, the encoder's and the decoder's. The model comes apart
in these three places, so that a strategy can split it from outside; nothing in this file knows of devices or ranks.
Shapes: B rows (sequences), T positions, C = d_model, H heads of width D, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanopre.attention import attend
from nanopre.loss import LinearCrossEntropy
from nanopre.norm import LayerNorm, RMSNorm
from nanopre.positions import RelativeBias, rotary_table, rotate

if TYPE_CHECKING:
    from nanopre.generate import KeyValueCache, LayerCache

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
}
GATED = ("swiglu", "geglu", "geglu_tanh")  # down(activation(gate(h)) * up(h)) (Shazeer, 2020)


@dataclass(frozen=True)
class ModelConfig:
    """The settings of a Transformer. GPT-2, LLaMA, BERT and T5 are four choices of them (plugins/models/)."""

    vocab_size: int
    seq_len: int  # longest sequence, in tokens
    d_model: int
    n_layers: int  # of an encoder-decoder: of the encoder
    n_heads: int
    n_kv_heads: int  # heads of the keys and values; n_heads / n_kv_heads queries share each (Ainslie et al., 2023)
    d_ff: int  # inner width of the MLP
    positions: Literal["learned", "rope", "relative"]
    norm: Literal["layernorm", "rmsnorm"]
    norm_eps: float
    activation: Literal["gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh"]
    bias: bool  # in the linear layers and LayerNorms
    tie_embeddings: bool  # the output projection is the token embedding
    architecture: Literal["decoder", "encoder", "encoder-decoder"] = "decoder"
    n_decoder_layers: int = 0  # of an encoder-decoder
    d_head: int = 0  # width of a head; 0: d_model / n_heads
    post_norm: bool = False  # norms follow the residual sums (Vaswani et al., 2017); else they come before the layers
    embedding_norm: bool = False  # a norm after the sum of embeddings
    n_segments: int = 0  # kinds of segments, each with an embedding that is added to its tokens'
    transform: bool = False  # a dense layer, GELU and norm before the output projection, which then has a bias
    scale_attention: bool = True  # scores by 1 / sqrt(D)
    scale_logits: bool = False  # by 1 / sqrt(C)
    relative_buckets: int = 32
    relative_distance: int = 128  # beyond which all distances share a bucket
    qk_norm: bool = False  # RMSNorm of each head's queries and keys (Henry et al., 2020)
    rope_theta: float = 10_000.0
    dropout: float = 0.0
    mup_base_width: int = 0  # d_model at which the learning rate was found, which muP carries over; 0: no muP

    def __post_init__(self):
        least = dict.fromkeys(("vocab_size", "seq_len", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"), 1)
        least |= dict(n_decoder_layers=int(self.architecture == "encoder-decoder"), d_head=0, norm_eps=0, mup_base_width=0)
        if self.positions == "relative":
            least["relative_buckets"] = 4  # one for distance 0 and one for all others, in either direction
            least["relative_distance"] = self.relative_buckets // 2 + 1
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {value}")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta = {self.rope_theta} must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and below 1")
        if not self.d_head and self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"d_model / n_heads = {self.head_dim} must be even for rotary positions")

    @property
    def head_dim(self) -> int:
        return self.d_head or self.d_model // self.n_heads

    @property
    def width_ratio(self) -> float:
        """How many times wider than its base a model in the maximal-update parametrisation is (muP; Yang et al., 2022, table
        8); 1 without. The blocks' matrices start with 1 / sqrt(ratio) of the standard deviation and learn with a smaller rate
        (nanopre.optim), logits are divided by it. Embeddings and vectors stay as they are; of depth it says nothing."""
        return self.d_model / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def attention_scale(self) -> float | None:
        """What products of queries and keys are multiplied by; None: 1 / sqrt(D). With muP by 1 / D (Yang et al., 2022,
        definition 4.1), and so that heads of the usual 64 have what they would have without."""
        if not self.scale_attention:
            return 1.0
        return 64**0.5 / self.head_dim if self.mup_base_width else None

    @property
    def logit_scale(self) -> float:
        return (self.d_model**-0.5 if self.scale_logits else 1.0) / self.width_ratio


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, eps=config.norm_eps)


def cast_for_products(h: Tensor) -> Tensor:
    """Under autocast, h in its precision: once here instead of once in each projection that reads h."""
    device = h.device.type
    return h.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else h


# ---------------------------------------------------------------------------------------------------------------------
# Attention, MLP and blocks


class Attention(nn.Module):
    """Attention with separate query, key, value and output projections, each of which splits by heads: of a stream to
    itself ("causal" or "bidirectional") or to an encoder's output ("cross")."""

    products = False  # see `attend`; chosen in machine.py

    def __init__(self, config: ModelConfig, kind: Literal["causal", "bidirectional", "cross"]):
        super().__init__()
        self.kind, self.head_dim, self.dropout = kind, config.head_dim, config.dropout
        self.scale = config.attention_scale
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q = nn.Linear(config.d_model, width, bias=config.bias)
        self.k = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.v = nn.Linear(config.d_model, kv_width, bias=config.bias)
        self.out = nn.Linear(width, config.d_model, bias=config.bias)
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        has_rope = config.positions == "rope" and kind != "cross"
        rope = rotary_table(config.seq_len, config.head_dim, config.rope_theta) if has_rope else None
        self.register_buffer("rope", rope, persistent=False)

    def forward(
        self,
        h: Tensor,
        source: Tensor | None = None,
        visible: Tensor | None = None,
        bias: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """h (B, T, C) attends to itself and, with a cache, to earlier positions; "cross" to `source` (B, S, C), which
        may be left out once the cache holds its keys and values. visible and bias: see nanopre.attention.attend."""
        B, T, _ = h.shape
        h = cast_for_products(h)
        q = self.q_norm(self.split(self.q(h)))  # (B, H, T, D)
        if self.kind == "cross":
            k, v = self.keys_values(source) if source is not None else cache.source
            if cache is not None:
                cache.source = k, v
        else:
            k, v = self.keys_values(h)
            if self.rope is not None:
                start = 0 if cache is None else cache.length
                table = self.rope[:, start : start + T]
                q, k = rotate(q, table), rotate(k, table)
            if cache is not None:
                k, v = cache.extend(k, v)  # (B, H_kv, S, D)
        dropout = self.dropout if self.training else 0.0
        a = attend(q, k, v, self.kind == "causal", visible, bias, self.scale, dropout, self.products)
        return self.out(a.transpose(1, 2).reshape(B, T, -1))

    @torch.no_grad()
    def start_near(self) -> None:
        """First biases of rotary attention: half of the heads begin with a preference for tokens nearby, for what a constant
        query and a constant key give falls with their distance. From biases of 0 that is learnt late, since each one's
        gradient is a multiple of the other: after 100 steps of MLM a model of a million parameters is still at the
        unigram's 5.9 nats, and at 5.2 with these (benchmarks/README.md)."""
        if self.rope is not None and self.q.bias is not None:
            for layer in (self.q, self.k):
                heads = layer.bias.view(-1, self.head_dim)
                heads[: -(-len(heads) // 2)] = 1.0

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        source = cast_for_products(source)
        return self.k_norm(self.split(self.k(source))), self.split(self.v(source))  # (B, H_kv, S, D) each

    def split(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) to (B, heads, T, D). The number of heads is left to view(): where a strategy has split the
        projections, fewer are here."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """down(activation(up(h))), or down(activation(gate(h)) * up(h))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if config.activation in GATED else None
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, h: Tensor) -> Tensor:
        h = cast_for_products(h)
        if self.gate is None:
            return self.down(self.activation(self.up(h)))
        return self.down(self.activation(self.gate(h)) * self.up(h))


class Block(nn.Module):
    """A residual block of attention and MLP, of a decoder ("causal") or an encoder ("bidirectional").

    What flows from block to block is a tuple of tensors: (h,), or (h, decoder's stream) through the encoder of an
    encoder-decoder. A block ignores the tensors of the batch that it does not need.
    """

    def __init__(self, config: ModelConfig, kind: Literal["causal", "bidirectional"], out_norm: bool = False):
        super().__init__()
        self.post_norm = config.post_norm
        self.attn_norm, self.attn = make_norm(config), Attention(config, kind)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.out_norm = make_norm(config) if out_norm else nn.Identity()  # at the end of an encoder-decoder's encoder

    def add(self, h: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The residual sum of h and the layer's output."""
        if self.post_norm:
            return norm(h + self.dropout(layer(h)))
        return h + self.dropout(layer(norm(h)))

    def forward(
        self,
        h: Tensor,
        *rest: Tensor,
        cache: LayerCache | None = None,
        visible: Tensor | None = None,
        bias: Tensor | None = None,
        **_,
    ) -> tuple[Tensor, ...]:
        h = self.add(h, self.attn_norm, partial(self.attn, visible=visible, bias=bias, cache=cache))
        h = self.add(h, self.mlp_norm, self.mlp)
        return (self.out_norm(h), *rest)


class DecoderBlock(Block):
    """A block of an encoder-decoder's decoder: between its own attention and MLP the stream attends to the encoder's
    output. The state is (encoder's output, stream)."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, "causal")
        self.cross_norm, self.cross = make_norm(config), Attention(config, "cross")

    def forward(
        self,
        encoded: Tensor | None,
        h: Tensor,
        cache: LayerCache | None = None,
        visible: Tensor | None = None,
        decoder_bias: Tensor | None = None,
        **_,
    ) -> tuple[Tensor | None, Tensor]:
        h = self.add(h, self.attn_norm, partial(self.attn, bias=decoder_bias, cache=cache))
        h = self.add(h, self.cross_norm, partial(self.cross, source=encoded, visible=visible, cache=cache))
        h = self.add(h, self.mlp_norm, self.mlp)
        return encoded, h


# ---------------------------------------------------------------------------------------------------------------------
# The two ends


class Embedding(nn.Module):
    """Token ids (B, T), and those of the decoder if there are, to their streams (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        learned = config.positions == "learned"
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.seq_len, config.d_model) if learned else None
        self.segments = nn.Embedding(config.n_segments, config.d_model) if config.n_segments else None
        self.norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Tensor | None,
        decoder_tokens: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KeyValueCache | None = None,
        **_,
    ) -> tuple[Tensor | None, ...]:
        start = 0 if cache is None else cache.length
        if decoder_tokens is None:
            return (self.embed(tokens, start, segments),)
        encoded = None if tokens is None else self.embed(tokens, 0, segments)
        return encoded, self.embed(decoder_tokens, start, None)

    def embed(self, tokens: Tensor, start: int, segments: Tensor | None) -> Tensor:
        """The stream of tokens at positions start, start + 1, ...; without `segments` all are in the first."""
        h = self.tokens(tokens)
        h = h.float() if h.dtype == torch.bfloat16 else h  # the stream is float32, whatever the weights are
        if self.positions is not None:
            h = h + self.positions.weight[start : start + tokens.shape[1]]
        if self.segments is not None:
            h = h + (self.segments.weight[0] if segments is None else self.segments(segments))
        return self.dropout(self.norm(h))


class Head(nn.Module):
    """The last norm, then either logits or, with `loss`, what that function makes of the normed stream.

    An objective's `loss(head, h, batch)` calls `head.cross_entropy`, so that it decides which positions meet the
    vocabulary, and the logits of a whole batch are never held; or it reads an output that the objective has added.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = nn.Identity() if config.post_norm else make_norm(config)
        self.dense = nn.Linear(config.d_model, config.d_model) if config.transform else None
        self.dense_norm = make_norm(config) if config.transform else None
        self.proj = nn.Linear(config.d_model, config.vocab_size, bias=config.transform)
        self.d_model = config.d_model
        self.scale = config.logit_scale
        self.outputs = nn.ModuleDict()
        self.pooler = None
        self.linear_cross_entropy = LinearCrossEntropy.apply  # a strategy that splits the vocabulary puts its own here

    def forward(self, *state: Tensor, loss: Callable | None = None, **batch) -> Tensor | dict[str, Tensor]:
        h = self.norm(state[-1])
        return self.proj(self.before_projection(h)) if loss is None else loss(self, h, batch)

    def before_projection(self, h: Tensor) -> Tensor:
        if self.dense is not None:
            h = self.dense_norm(F.gelu(self.dense(h)))
        return h * self.scale if self.scale != 1.0 else h

    def cross_entropy(self, h: Tensor, targets: Tensor, count_correct: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Sum over the targets of -log p(target), in nats, as a float32 scalar. h (..., C) and targets (...); a target
        of IGNORE counts nothing. With `count_correct` also for how many targets no other token is likelier."""
        h = self.before_projection(h.reshape(-1, h.shape[-1]))
        parameters = (self.proj.weight, self.proj.bias)
        if not torch.is_grad_enabled():
            # no_grad does not reach a Function's needs_input_grad: a parameter would have an evaluation make its gradient.
            parameters = (p if p is None else p.detach() for p in parameters)
        total, correct = self.linear_cross_entropy(h, *parameters, targets.reshape(-1), count_correct)
        return (total, correct) if count_correct else total

    def add_output(self, name: str, width: int, pooled: bool = False) -> None:
        """Add a linear map from C to `width` numbers, which `output(name, h)` computes, before the first weights are
        drawn: of every position, or of the row's first through BERT's pooler (Devlin et al., 2019, section 3.1)."""
        self.outputs[name] = nn.Linear(self.d_model, width)
        if pooled and self.pooler is None:
            self.pooler = nn.Linear(self.d_model, self.d_model)

    def drop_projection(self) -> None:
        """For an objective that reads added outputs alone: parameters without a gradient would only be in the way."""
        self.dense = self.dense_norm = self.proj = None

    def output(self, name: str, h: Tensor, pooled: bool = False) -> Tensor:
        """(B, T, width) of h (B, T, C), or (B, width)."""
        return self.outputs[name](torch.tanh(self.pooler(h[:, 0])) if pooled else h).float()


class Transformer(nn.Module):
    """`embed`, then `blocks`, then `head`. The blocks' keys "0", "1", ... keep the parameters' names when a strategy
    leaves some of them out; those of an encoder-decoder are the encoder's, then the decoder's. `relative` holds the
    biases that the blocks of a stack share, and goes with every part of a split model."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        n, is_encoder_decoder = config.n_layers, config.architecture == "encoder-decoder"
        kind = "causal" if config.architecture == "decoder" else "bidirectional"
        blocks = [Block(config, kind, out_norm=is_encoder_decoder and i == n - 1) for i in range(n)]
        blocks += [DecoderBlock(config) for _ in range(config.n_decoder_layers)]
        self.embed = Embedding(config)
        self.relative = nn.ModuleDict()
        if config.positions == "relative":
            self.relative["bias"] = RelativeBias(config, bidirectional=kind == "bidirectional")
            if is_encoder_decoder:
                self.relative["decoder_bias"] = RelativeBias(config, bidirectional=False)
        self.blocks = nn.ModuleDict({str(i): block for i, block in enumerate(blocks)})
        self.head = Head(config)
        if config.tie_embeddings:
            self.head.proj.weight = self.embed.tokens.weight

    def forward(
        self,
        tokens: Tensor | None,
        loss: Callable | None = None,
        cache: KeyValueCache | None = None,
        decoder_tokens: Tensor | None = None,
        state: tuple[Tensor, ...] | None = None,
        **batch,
    ) -> Tensor | dict[str, Tensor] | tuple[Tensor, ...]:
        """tokens (B, T), T <= seq_len, to logits (B, T, V); with `loss`, to that function's sums.

        decoder_tokens: of an encoder-decoder, whose logits are theirs.
        visible (B,), in `batch`: how many tokens of a row are not padding, in an encoder; in a decoder how many, from the
            first on, see each other in both directions.
        cache: keys and values of earlier positions (nanopre.generate.KeyValueCache). An encoder-decoder with a cache
            that holds its encoder's needs no `tokens`.
        state: where only a part of the blocks is here, the streams that come from the part before, in place of embeddings.
            A part without a head gives the streams in place of logits.
        """
        if state is None:
            state = self.embed(tokens, decoder_tokens=decoder_tokens, cache=cache, **batch)
        streams = {"bias": tokens, "decoder_bias": decoder_tokens}
        past = 0 if cache is None else cache.length
        for name, bias in self.relative.items():
            if (stream := streams[name]) is not None:
                batch[name] = bias(stream.shape[1], past + stream.shape[1])
        for name, block in self.blocks.items():
            if tokens is not None or hasattr(block, "cross"):  # else the cache holds what the encoder has to say
                state = block(*state, cache=None if cache is None else cache[name], **batch)
        return state if self.head is None else self.head(*state, loss=loss, **batch)

    def init_std(self, name: str) -> float | None:
        """Standard deviation of a weight at the start; None: a norm's weight (1) or a bias (0).

        GPT-2's rule (Radford et al., 2019, section 2.3): 0.02, and less for the matrices that write to the residual
        stream, so that its variance does not grow with the depth. After T5's (Raffel et al., 2020): an embedding whose
        logits are scaled has 1, and unscaled attention smaller queries. With muP a wider model's blocks
        have smaller matrices.
        """
        config, std = self.config, 0.02
        if name.endswith(".bias") or "norm." in name:
            return None
        if name == "embed.tokens.weight" and config.scale_logits:
            return 1.0
        if name.startswith("relative."):
            return config.d_model**-0.5
        if name.startswith("blocks."):
            std *= config.width_ratio**-0.5
        if name.endswith(".q.weight") and not config.scale_attention:
            return std * config.head_dim**-0.5
        if name.endswith((".out.weight", ".down.weight")) and not config.post_norm:
            # A block of a decoder adds to the stream twice, one that attends to an encoder, too, three times.
            return std / math.sqrt(max(2 * config.n_layers, 3 * config.n_decoder_layers))
        return std


SPLITS = {
    **dict.fromkeys(("q", "k", "v", "up", "gate"), "column"),
    **dict.fromkeys(("out", "down"), "row"),
    **dict.fromkeys(("tokens", "proj"), "vocab"),
}
"""How the layers of these names split over ranks (Shoeybi et al., 2019, section 3), for a strategy that does it: "column" by
outputs, "row" by inputs, after which the ranks' results are summed, "vocab" by tokens. All others stay whole."""
