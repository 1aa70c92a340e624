"""The memory of a training step on each GPU of a pipeline: what is held all the time, and the peak of what comes and goes.

Parameters, gradients and optimizer states are counted on the model itself, split as the strategies split it (Rajbhandari et
al., "ZeRO", 2020, section 3); activations as nanopre/activations.py counts them, for so many micro-batches as the pipeline's
schedule holds (nanopre/timetable.py); the head as nanopre/loss.py works, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from nanopre import activations, cost
from nanopre.activations import Tokens
from nanopre.config import Config
from nanopre.loss import LinearCrossEntropy
from nanopre.model import SPLITS, Transformer
from nanopre.parallel import Layout
from nanopre.timetable import most_held, share_out

CONTEXT = 1.3e9
"""Bytes that a process takes on a GPU before it trains: CUDA's context (0.5 GB on an H100), cuBLAS's workspace, NCCL's buffers
for some groups. An assumption."""


@dataclass
class Stage:
    """Bytes on each GPU of one rank of the pipeline. `peak` is less than the sum of the others, which do not all have their
    most at the same time; `moment` says when it is."""

    blocks: int  # how many are here
    parameters: float
    gradients: float
    states: float  # of the optimizer
    activations: float
    copies: float  # of weights, in the precision of products, which autograd keeps
    logits: float  # and what the loss has made of them: gradients of the last stream and of the output projection
    buffers: float  # gathered parameters, what is received, the context
    peak: float
    moment: str


@dataclass(frozen=True)
class Numbers:
    """How many numbers a part of the model has on one rank of a tensor group."""

    parameters: float = 0
    products: float = 0  # of them in the weights of linear layers
    states: float = 0  # bytes of optimizer states

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(
            self.parameters + other.parameters, self.products + other.products, self.states + other.states
        )


def two_moments(kind: str, n: float) -> float:
    """Bytes that AdamW has for n numbers: what is assumed of an optimizer that does not say."""
    return 8 * n


def state_bytes(config: Config, state_bits: int = 0) -> Callable[[str, float], float]:
    """(kind, n) -> bytes that the config's optimizer has for n numbers of a kind of parameter. state_bits: as if it had two
    moments of so many bits."""
    if state_bits:
        return lambda kind, n: 2 * state_bits / 8 * n
    return getattr(config.optimizer, "state_bytes", two_moments)


class Weights:
    """The numbers of each part of a model, split over `tensor` ranks by model.SPLITS and over `shard` ranks by FSDP."""

    def __init__(self, model: Transformer, tensor: int, shard: int, states: Callable[[str, float], float]):
        self.tensor, self.shard, self.states = tensor, shard, states
        self.blocks = [self.count(block, "matrix") for block in model.blocks.values()]
        self.tokens = self.count(model.embed.tokens, "end", "tokens")
        self.embed, self.head = self.count(model.embed, "end"), self.count(model.head, "end")  # tied: the head has it, too
        self.relative = {name: self.count(part, "end") for name, part in model.relative.items()}

    def count(self, module: nn.Module, kind: str, name: str = "") -> Numbers:
        total = Numbers()
        for key, p in module.named_parameters():
            *_, layer, leaf = ["", name, *key.split(".")]
            style, sizes = SPLITS.get(layer), list(p.shape)
            if style in ("column", "vocab"):
                sizes[0] = -(-sizes[0] // self.tensor)
            elif style == "row" and leaf == "weight":
                sizes[1] = -(-sizes[1] // self.tensor)
            n, is_matrix = 1, p.dim() > 1
            for size in sizes:
                n *= size
            states = self.states(kind if is_matrix else "vector", n / self.shard)
            total += Numbers(n, n if is_matrix and layer != "relative" else 0, states)
        return total


@lru_cache(256)
def _stages(blocks: tuple[float, ...], head: float, n: int) -> list[range]:
    return share_out(list(blocks), head, n)


def estimate(
    config: Config,
    layout: Layout,
    model: Transformer,
    example: dict[str, Tensor],
    device: str = "cuda",
    products: int = 2,
    weights: Weights | None = None,
) -> list[Stage]:
    """The stages of a layout (nanopre.parallel.plan), in the order of the pipeline's ranks.

    model: on the device "meta" (nanopre.planning.shape); example: a row of its batches; products: bytes of a number in
    products, 2 for bfloat16. `weights`: if they have been counted already.
    """
    c, s, sizes = model.config, layout.strategies, layout.sizes
    t, r, p = sizes["tensor"], sizes["shard"], sizes["pipeline"]
    weights = weights or Weights(model, t, r, state_bytes(config))
    w = 2 if config.train.weights == "bfloat16" else 4
    k = activations.kernels(device, products)
    pipe, fsdp, checkpointing = s.get("pipeline"), s.get("fsdp"), s.get("activation_checkpointing")
    in_flight, v = (pipe.microbatches, pipe.stages_per_rank) if pipe else (1, 1)
    share = config.train.batch_size // layout.data_size
    rows = config.train.micro_batch_size or share // in_flight
    mode = checkpointing.mode if checkpointing else "none"
    compiled = config.train.compile == "on" or config.train.compile == "auto" and device != "cpu"

    # What one micro-batch keeps in a block of each stack, and in the course of its backward pass.
    split = bool("tensor" in s and s["tensor"].sequence_parallel)
    visible = "visible" in example
    T = example["tokens"].shape[1]
    D = example["decoder_tokens"].shape[1] if "decoder_tokens" in example else 0
    encoder = Tokens(rows, T, 0, visible, t, split)
    decoder = Tokens(rows, D, T, visible, t, split)
    kind = "causal" if c.architecture == "decoder" else "bidirectional"
    stacks = [(encoder, kind)] * c.n_layers + [(decoder, "decoder")] * c.n_decoder_layers
    everything = {x: activations.block(c, k, *x) for x in set(stacks)}
    stream = activations.stream(c, k, encoder) + (activations.stream(c, k, decoder) if D else 0)
    kept = {
        "none": everything,
        "selective": {x: activations.stream(c, k, x[0]) + activations.products(c, k, *x) for x in everything},
        "full": {x: activations.stream(c, k, x[0]) for x in everything},
    }[mode]
    if "activation_offload" in s and device != "cpu":
        kept = dict.fromkeys(kept, 0.0)
    # In a block's backward pass: the stream's gradient twice, that of the MLP's width, and what is computed again.
    gated = c.activation in activations.GATED
    working = {
        x: 2 * activations.stream(c, k, x[0])
        + (2 if gated else 1) * x[0].rows * x[0].T * -(-c.d_ff // t) * products
        + (everything[x] - kept[x])
        for x in everything
    }
    last = decoder if D else encoder

    # The head: its norm, what it keeps to the backward pass, and one chunk of logits.
    scored = example["positions"].shape[1] if "positions" in example else last.T
    n, V, C = rows * scored, -(-c.vocab_size // t), c.d_model
    h_bytes = products if c.transform else k.stream
    normed = 0 if c.post_norm else activations.norm(c, k, Tokens(rows, last.T))
    transform = n * C * (k.stream + 4 * products) + 8 * n if c.transform else 0  # gathered; in and out of GELU and norm
    gradients = 4 * V * C + n * C * h_bytes
    rows_at_once = max(1, LinearCrossEntropy.LOGITS_PER_CHUNK // V)
    chunk = min(n, rows_at_once) * V
    # Float32 logits and log-probabilities, and casts; where a chunk follows another, whose own are not yet gone.
    at_once = chunk * ((16 if n > rows_at_once else 10) if products < 4 else 12 if n > rows_at_once else 8)
    casts = 2 * V * C * products if products < w else V * C * products  # of the weight; of its gradient
    loss = rows * last.T * C * k.stream + max(at_once, chunk * (10 if products < 4 else 8) + casts)

    ranges = _stages(*_costs(model, example), p * v)
    result = []
    for rank in range(p):
        here = [i for stage in range(rank, p * v, p) for i in ranges[stage]]
        has_embed, has_head = rank == 0, rank == p - 1
        part = sum((weights.blocks[i] for i in here), Numbers())
        ends = weights.embed if has_embed else Numbers()
        if has_head:
            tied = c.tie_embeddings and has_embed
            head, tokens = weights.head, weights.tokens
            ends += Numbers(head.parameters - tokens.parameters, 0, head.states - tokens.states) if tied else head
        for name, bias in weights.relative.items():
            if any((stacks[i][1] == "decoder") == (name == "decoder_bias") for i in here):
                ends += bias
        N = part.parameters + ends.parameters
        held = most_held(pipe.schedule, p, in_flight, v, rank) / v if p > 1 else 1
        blocks_kept = sum(kept[stacks[i]] for i in here)
        if c.architecture == "encoder-decoder" and c.n_layers - 1 in here:
            blocks_kept += activations.norm(c, k, encoder)
        embedding = activations.norm(c, k, encoder) if has_embed and c.embedding_norm else 0
        # A stream that no block of its own keeps: an encoder-decoder's other one; what a stage hands on.
        others = (stream if rank < p - 1 else 0) * held * v + (activations.stream(c, k, encoder) if D else 0) * held
        acts = held * (blocks_kept + embedding) + others
        at_head = 1
        if has_head:
            at_head = {"gpipe": in_flight, "zero_bubble": min(in_flight, p)}.get(pipe.schedule, 1) if p > 1 else 1
            acts += at_head * (normed + transform)
        copies = 0.0
        copied = products * part.products if products < w and not compiled and not _gathers_products(fsdp, products) else 0
        if mode == "none":
            copies = copied

        buffers = 0.0 if device == "cpu" else CONTEXT
        if p > 1:  # a buffer for each micro-batch's streams, and for their gradients; the first block keeps those that it read
            buffers += stream * v * (max(0, in_flight - held) if rank else 0) + stream * v * (in_flight if rank < p - 1 else 0)
        gather, scatter = _fsdp_buffers(layout, weights, here, ends, w, p > 1)

        P, S = w * N / r, (part.states + ends.states)
        G = w * N / r
        if fsdp and fsdp.cpu_offload and device != "cpu":
            P, G, S = 0.0, 0.0, 0.0
        always = P + S + buffers
        early = p > 1 or share > rows * in_flight or "ddp" in s  # gradients are there before the last backward pass begins
        own = at_head * gradients if has_head else 0.0
        block = max((working[stacks[i]] for i in here), default=0.0)
        again = copied / max(1, len(here)) if mode != "none" else 0.0
        # While autocast lasts, its cache holds what it has cast.
        cached = copied if mode != "none" else copies
        base = always + (G if early else 0.0)
        embedding_gradient = w * weights.tokens.parameters if has_embed and has_head and c.tie_embeddings else 0.0
        kept_in_first = held * kept[stacks[here[0]]]
        moments = {
            "at the loss": base + acts + cached + gather + (own + loss if has_head else 0.0),
            "as the backward pass begins": base + acts + copies + gather + 2 * own,
            "in the backward pass": base + acts + copies + gather + scatter + own + block + again,
            "as the backward pass ends": always + G + gather + scatter + kept_in_first + block + again + embedding_gradient,
            "in the optimizer's step": always + G,
        }
        moment = max(moments, key=moments.get)
        result.append(
            Stage(
                len(here), P, G, S, acts, cached, own + (loss if has_head else 0.0), buffers + gather + scatter,
                moments[moment], moment,
            )
        )  # fmt: skip
    return result


def _costs(model: Transformer, example: dict[str, Tensor]) -> tuple[tuple[float, ...], float]:
    blocks, head = cost.batch_flops(model.config, example)
    return tuple(blocks), head


def _gathers_products(fsdp, products: int) -> bool:
    """Whether FSDP gathers weights in the precision of products, so that none are cast."""
    return fsdp is not None and fsdp.param_dtype == "bfloat16" and products == 2


def _fsdp_buffers(layout: Layout, weights: Weights, here: list[int], ends: Numbers, w: int, is_pipeline: bool) -> tuple:
    """(bytes of gathered parameters, bytes that gradients need besides in the backward pass) where FSDP2 runs: with [fsdp],
    and with [ddp] beside other strategies, which is FSDP2 with shards of one rank."""
    s, sizes = layout.strategies, layout.sizes
    fsdp = s.get("fsdp")
    if fsdp is None and not ("ddp" in s and sizes["tensor"] * sizes["pipeline"] > 1):
        return 0.0, 0.0
    gathered = 2 if fsdp and fsdp.param_dtype == "bfloat16" else w
    reduced = 2 if fsdp and fsdp.reduce_dtype == "bfloat16" else 4 if fsdp else w
    blocks = [weights.blocks[i].parameters for i in here]
    largest, every = max(blocks, default=0.0), sum(blocks)
    if fsdp is None:  # one group for the whole part: its parameters are copied, its gradients summed as they are
        return gathered * (every + ends.parameters), w * (every + ends.parameters) if is_pipeline else 0.0
    if is_pipeline:  # gradients are summed over micro-batches before they are scattered, and parameters stay
        return gathered * (every + ends.parameters), reduced * (every + ends.parameters + largest)
    # A block that runs, the next one, and the message in which that comes; its gradient, and the message that it leaves in.
    gather = 3 * largest if fsdp.reshard_after_forward else every + largest
    return gathered * (gather + ends.parameters), (gathered + reduced) * max(largest, ends.parameters)
