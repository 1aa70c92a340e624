"""What a block's forward pass keeps for its backward pass, in bytes: a count that follows nanopre/model.py.

After Korthikanti et al., "Reducing activation recomputation in large transformer models" (2022), section 4, whose GPT keeps
s b h (34 + 5 a s / h) bytes a layer: here for every model that model.py builds, as torch keeps it. Letters as in model.py:
T positions, S of them that are attended to, C = d_model, H heads of width D, F = d_ff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanopre.attention import QUERIES_AT_A_TIME, parts_of_queries
from nanopre.model import GATED, ModelConfig


@dataclass(frozen=True)
class Kernels:
    """What a device's kernels keep. Bytes are of one number."""

    stream: int  # bytes, of the stream between blocks and in norms
    products: int  # bytes, of what products read and give
    queries: int  # at a time, whose scores are then kept; 0: one kernel does attention and keeps none (Dao et al., 2022)
    mask: int  # bytes, of what dropout keeps
    cpu: bool = False  # whose RMSNorm of what is split over ranks keeps more, and who casts what is added to a sum


def kernels(device: str, products: int) -> Kernels:
    """Those that train.py chooses on a "cpu" or elsewhere, with products of so many bytes a number."""
    if device == "cpu":
        return Kernels(4, products, queries=QUERIES_AT_A_TIME, mask=products, cpu=True)
    return Kernels(4, products, queries=0, mask=1)


@dataclass(frozen=True)
class Tokens:
    """What goes through a block at once on one rank."""

    rows: int
    T: int
    S: int = 0  # of the encoder, for a block of an encoder-decoder's decoder
    visible: bool = False  # whether rows tell how many of their tokens are seen
    tensor: int = 1  # ranks that share each layer's heads and inner width
    sequence_parallel: bool = False  # and the stream's tokens

    @property
    def stream_share(self) -> float:
        """Of the stream's tokens, what is on this rank."""
        return 1 / self.tensor if self.sequence_parallel else 1.0


def stream(c: ModelConfig, k: Kernels, x: Tokens) -> float:
    """Bytes of the stream between two blocks."""
    return x.rows * x.T * x.stream_share * c.d_model * k.stream


def block(c: ModelConfig, k: Kernels, x: Tokens, kind: Literal["causal", "bidirectional", "decoder"]) -> float:
    """Bytes that a block keeps if nothing of it is computed again. "decoder": of an encoder-decoder."""
    causal = kind != "bidirectional"
    kept = norm(c, k, x) + layer_input(c, k, x) + attention(c, k, x, x.T, causal, c.positions == "relative")
    if kind == "decoder":
        kept += norm(c, k, x) + layer_input(c, k, x) + attention(c, k, x, x.S, False, False)
        kept += x.rows * x.S * c.d_model * k.products if k.products < k.stream else 0  # the encoder's output, cast
    kept += norm(c, k, x) + layer_input(c, k, x) + mlp(c, k, x)
    if c.dropout:
        kept += (3 if kind == "decoder" else 2) * x.rows * x.T * x.stream_share * c.d_model * k.mask
    return kept


def norm(c: ModelConfig, k: Kernels, x: Tokens) -> float:
    """What a norm reads, and its mean and deviation, or a deviation alone, of each token."""
    in_parts = k.cpu and c.norm == "rmsnorm" and x.sequence_parallel  # torch's own (nanopre/norm.py), which keeps one more
    statistics = 8 if c.norm == "layernorm" else 4
    return stream(c, k, x) * (2 if in_parts else 1) + x.rows * x.T * x.stream_share * statistics


def layer_input(c: ModelConfig, k: Kernels, x: Tokens) -> float:
    """What the first products of attention or MLP read: the whole sequence, also where the stream between is split."""
    return x.rows * x.T * c.d_model * k.products


def attention(c: ModelConfig, k: Kernels, x: Tokens, S: int, causal: bool, biased: bool) -> float:
    """Queries, keys, values and what follows from them, up to the output projection's input."""
    T, S, heads, kv_heads, D, p = x.T, S or x.T, c.n_heads / x.tensor, c.n_kv_heads / x.tensor, c.head_dim, k.products
    query, key = x.rows * T * heads * D * p, x.rows * S * kv_heads * D * p
    kept = query  # the output projection's input
    if c.qk_norm:  # of each head's queries and keys
        in_parts = 8 / p if k.cpu and x.tensor > 1 else 1  # in float32, of which two are kept
        kept += (query + key) * in_parts + 4 * x.rows * (T * heads + S * kv_heads)
    rotary = c.positions == "rope" and S == T
    if rotary and p < 4:
        kept += 2 * T * D * p  # the table, cast for queries and for keys
    if not k.queries:
        mask = (heads if biased else 1) * (x.rows if x.visible else 1) * T * S * p if biased or x.visible else 0
        return kept + query + 2 * key + 4 * x.rows * heads * T + mask
    # AttendByProducts: the softmax of each score that causality leaves, and with dropout what it leaves of them, and its mask.
    pairs = sum((end - start) * seen for start, end, seen in parts_of_queries(T, S, causal and not x.visible, k.queries))
    return kept + query + 2 * key + x.rows * heads * pairs * (p + (p + 1 if c.dropout else 0))


def mlp(c: ModelConfig, k: Kernels, x: Tokens) -> float:
    """Before and after the activation, and what its product with the gate is made of. ReLU needs its output alone."""
    widths = 4 if c.activation in GATED else 1 if c.activation == "relu" else 2
    return widths * x.rows * x.T * -(-c.d_ff // x.tensor) * k.products


def products(c: ModelConfig, k: Kernels, x: Tokens, kind: str) -> float:
    """Bytes of the outputs of a block's products with weights, and of attention where one kernel does it: what "selective"
    activation checkpointing keeps beside the stream that enters the block."""
    n, source = x.rows * x.T, x.rows * x.S
    heads, kv_heads, wide = c.n_heads / x.tensor, c.n_kv_heads / x.tensor, -(-c.d_ff // x.tensor)
    fused = 0 if k.queries else n * heads * (c.head_dim * k.products + 4)
    numbers = n * (heads * c.head_dim + c.d_model) + 2 * n * kv_heads * c.head_dim  # of attention
    if kind == "decoder":
        numbers += n * (heads * c.head_dim + c.d_model) + 2 * source * kv_heads * c.head_dim
        fused *= 2
    numbers += n * (c.d_model + (2 if c.activation in GATED else 1) * wide)
    return numbers * k.products + fused
