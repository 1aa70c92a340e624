"""The memory of a training step on each GPU of a pipeline: what is held all the time, and the peak of what comes and goes.

Parameters, gradients and optimizer states are counted on the model itself, split as the strategies split it (Rajbhandari et
al., "ZeRO", 2020, section 3); activations as activations.py beside this file counts them, for so many micro-batches as the
pipeline's schedule holds (nanopre/timetable.py); the head as nanopre/loss.py works, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal, NamedTuple

from torch import Tensor, nn

from nanopre import cost
from nanopre.config import Config
from nanopre.loss import LinearCrossEntropy
from nanopre.model import GATED, SPLITS, ModelConfig, Transformer
from nanopre.parallel import Layout
from nanopre.planning import activations
from nanopre.planning.activations import Kernels, Tokens
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
    logits: float  # and what the loss makes of them: gradients of the last stream and of the output projection
    buffers: float  # gathered parameters, what is received, the context
    peak: float
    moment: str


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@dataclass(frozen=True)
class Numbers:
    """How many numbers a part of the model has on one rank of a tensor group."""

    parameters: float = 0
    products: float = 0  # of them in the weights of linear layers
    states: float = 0  # bytes of optimizer states on one rank, of FSDP's too

    def __add__(self, other: Numbers) -> Numbers:
        return Numbers(self.parameters + other.parameters, self.products + other.products, self.states + other.states)

    def __sub__(self, other: Numbers) -> Numbers:
        return Numbers(self.parameters - other.parameters, self.products - other.products, self.states - other.states)


def two_moments(kind: str, n: float) -> float:
    """Bytes that AdamW keeps for n numbers: what is assumed of an optimizer that does not say."""
    return 8 * n


class Weights:
    """The numbers of each part of a model, split over `tensor` ranks by model.SPLITS and over `shard` ranks by FSDP.

    states(kind, n): bytes that an optimizer keeps for n numbers of a "matrix" of a block, of an "end" (embeddings, output
    projection) or of a "vector".
    """

    def __init__(self, model: Transformer, tensor: int, shard: int, states: Callable[[str, float], float]):
        self.config, self.tensor, self.shard, self.states = model.config, tensor, shard, states
        self.blocks = [self.count(block, "matrix") for block in model.blocks.values()]
        self.before = list(accumulate(self.blocks, initial=Numbers()))  # of the blocks before each one
        self.tokens = self.count(model.embed.tokens, "end", "tokens")
        self.embed, self.head = self.count(model.embed, "end"), self.count(model.head, "end")  # tied: the head has it, too
        self.relative = {name: self.count(part, "end") for name, part in model.relative.items()}

    def count(self, module: nn.Module, kind: str, name: str = "") -> Numbers:
        total = Numbers()
        for key, p in module.named_parameters():
            *_, layer, leaf = ["", name, *key.split(".")]
            style, split = SPLITS.get(layer), 1.0
            if style in ("column", "vocab"):
                split = -(-p.shape[0] // self.tensor) / p.shape[0]  # of parts that are uneven, the largest
            elif style == "row" and leaf == "weight":
                split = -(-p.shape[1] // self.tensor) / p.shape[1]
            n, is_matrix = p.numel() * split, p.dim() > 1
            total += Numbers(n, n if is_matrix else 0, self.states(kind if is_matrix else "vector", n / self.shard))
        return total


@lru_cache(4096)
def on_rank(weights: Weights, ranges: tuple[range, ...], pipeline: int, rank: int) -> tuple[Numbers, Numbers]:
    """(blocks, all else) of a rank of a pipeline whose stages have these blocks: stage s is on rank s % ranks."""
    c, here = weights.config, ranges[rank::pipeline]
    blocks = sum((weights.before[x.stop] - weights.before[x.start] for x in here), Numbers())
    is_first, is_last = rank == 0, rank == pipeline - 1
    ends = (weights.embed if is_first else Numbers()) + (weights.head if is_last else Numbers())
    if is_first and is_last and c.tie_embeddings:
        ends -= weights.tokens
    for name, bias in weights.relative.items():
        stack = range(c.n_layers, len(weights.blocks)) if name == "decoder_bias" else range(c.n_layers)
        if any(x.start < stack.stop and stack.start < x.stop for x in here):
            ends += bias
    return blocks, ends


# ---------------------------------------------------------------------------------------------------------------------
# What a micro-batch keeps


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch keeps from its forward to its backward pass, in bytes, on one rank of a tensor group."""

    kept: tuple[float, float]  # by a block: of a decoder or encoder, and of an encoder-decoder's decoder
    recomputed: tuple[float, float]  # what of a block is computed again,
    working: tuple[float, float]  # which its backward pass needs beyond that, with the gradients of its streams
    outputs: tuple[float, float]  # of a block's products (activations.products)
    streams: float  # all that flow between two blocks
    encoded: float  # an encoder-decoder's other stream, which no block of its own keeps
    embedding: float  # where a norm follows the embeddings
    encoder_norm: float  # at the end of an encoder-decoder's encoder
    head: float  # the last norm, and the layers before the output projection
    head_gradients: float  # that the loss makes in the forward pass
    loss: float  # what else is there while it does so: the normed stream, a chunk of logits, casts


@lru_cache(4096)
def micro_batch(
    c: ModelConfig,
    k: Kernels,
    encoder: Tokens,
    decoder: Tokens | None,
    scored: int,
    recompute: Literal["none", "selective", "full"] = "none",
    offload: bool = False,
    cast: bool = False,
) -> MicroBatch:
    """encoder: what goes through the blocks; decoder: through those of an encoder-decoder's decoder; scored: positions of a
    row that meet the vocabulary; cast: whether products have another precision than weights."""
    kind = "causal" if c.architecture == "decoder" else "bidirectional"
    last = decoder or encoder
    kept, recomputed, working, outputs = [], [], [], []
    for x, name in ((encoder, kind), (decoder, "decoder")):
        if x is None:
            for values in (kept, recomputed, working, outputs):
                values.append(0.0)
            continue
        every, stream = activations.block(c, k, x, name), activations.stream(c, k, x)
        outputs.append(activations.products(c, k, x, name))
        here = {"none": every, "full": stream, "selective": stream + outputs[-1]}[recompute]
        kept.append(0.0 if offload else here)
        recomputed.append(every - here)
        wide = x.rows * x.T * -(-c.d_ff // x.tensor) * k.products
        # The stream's gradient and the sum that it goes into, those of the MLP's width; and what is computed again.
        working.append(2 * stream + (2 if c.activation in GATED else 1) * wide + every - kept[-1])

    n, V, C = last.rows * scored, -(-c.vocab_size // last.tensor), c.d_model
    whole = Tokens(last.rows, last.T)  # the head has every token
    head = 0.0 if c.post_norm else activations.norm(c, k, whole)
    if c.transform:  # what is gathered for it, what its product, GELU and norm read and give, the norm's statistics
        head += n * C * (k.stream + 4 * k.products) + 8 * n
    head_gradients = 4 * V * C + n * C * (k.products if c.transform else k.stream)
    rows = max(1, LinearCrossEntropy.LOGITS_PER_CHUNK // V)
    chunk, half = min(n, rows) * V, k.products < 4
    # A chunk: logits and log-probabilities in float32, and their gradient as products read it; the next one's beside it. Where
    # ranks share the vocabulary, all is done in place.
    alone, after_another = (10, 16) if half else (8, 12)
    if last.tensor > 1:
        alone, after_another = (6, 12) if half else (4, 8)
    summed = n > rows or last.tensor > 1  # else the one chunk's product, if it is float32, is the gradient itself
    product = V * C * k.products * ((half or summed) + cast)  # the projection's gradient of one chunk; the projection, cast
    product += 4 * V * C if half and k.cpu and summed else 0  # a CPU casts what is added to the sum over chunks
    loss = activations.stream(c, k, whole) + max(chunk * alone + product, chunk * after_another if n > rows else 0)
    return MicroBatch(
        kept=tuple(kept),
        recomputed=tuple(recomputed),
        working=tuple(working),
        outputs=tuple(outputs),
        streams=activations.stream(c, k, encoder) + (activations.stream(c, k, decoder) if decoder else 0),
        encoded=activations.stream(c, k, encoder) if decoder else 0.0,
        embedding=activations.norm(c, k, encoder) if c.embedding_norm else 0.0,
        encoder_norm=activations.norm(c, k, encoder) if decoder else 0.0,
        head=head,
        head_gradients=head_gradients,
        loss=loss,
    )


def of_layout(
    config: Config, layout: Layout, model: Transformer, example: dict[str, Tensor], device: str, products: int
) -> MicroBatch:
    """The micro-batch of a layout. Arguments as of `estimate`."""
    c, strategies, tensor = model.config, layout.strategies, layout.strategies.get("tensor")
    rows = rows_at_once(config, layout)
    t, split, visible = layout.sizes["tensor"], bool(tensor and tensor.sequence_parallel), "visible" in example
    T, D = (example[key].shape[1] if key in example else 0 for key in ("tokens", "decoder_tokens"))
    return micro_batch(
        c,
        activations.kernels(device, products),
        Tokens(rows, T, 0, visible, t, split),
        Tokens(rows, D, T, visible, t, split) if D else None,
        example["positions"].shape[1] if "positions" in example else D or T,
        strategies["activation_checkpointing"].mode if "activation_checkpointing" in strategies else "none",
        "activation_offload" in strategies and device != "cpu",
        products < weight_bytes(config),
    )


def in_flight(layout: Layout) -> int:
    """Micro-batches that go through a pipeline together."""
    return layout.strategies["pipeline"].microbatches if "pipeline" in layout.strategies else 1


def rows_at_once(config: Config, layout: Layout) -> int:
    """Sequences in a micro-batch."""
    return config.train.micro_batch_size or config.train.batch_size // layout.data_size // in_flight(layout)


def weight_bytes(config: Config) -> int:
    return 2 if config.train.weights == "bfloat16" else 4


# ---------------------------------------------------------------------------------------------------------------------
# A step


@lru_cache(1024)
def stages(blocks: tuple[float, ...], head: float, n: int) -> tuple[range, ...]:
    """As the pipeline shares them out."""
    return tuple(share_out(list(blocks), head, n))


def estimate(
    config: Config,
    layout: Layout,
    model: Transformer,
    example: dict[str, Tensor],
    device: Literal["cuda", "cpu"] = "cuda",
    products: int = 2,
    weights: Weights | None = None,
) -> list[Stage]:
    """The stages of a layout (nanopre.parallel.plan), in the order of the pipeline's ranks.

    model: on the device "meta" (nanopre.planning.preview.shape); example: a row of its batches; products: bytes of a number in
    products, 2 for bfloat16; weights: if the model's have been counted already.
    """
    c, strategies, sizes = model.config, layout.strategies, layout.sizes
    p, t, r = sizes["pipeline"], sizes["tensor"], sizes["shard"]
    weights = weights or Weights(model, t, r, getattr(config.optimizer, "state_bytes", two_moments))
    w, n_flight = weight_bytes(config), in_flight(layout)
    pipe, fsdp = strategies.get("pipeline"), strategies.get("fsdp")
    v = pipe.stages if pipe else 1
    share = config.train.batch_size // layout.data_size
    recomputes = "activation_checkpointing" in strategies and strategies["activation_checkpointing"].mode != "none"
    m = of_layout(config, layout, model, example, device, products)
    # Compiled blocks cast weights again in the backward pass, and FSDP may gather them cast.
    compiled = config.train.compile == "on" or config.train.compile == "auto" and device != "cpu"
    compiled = compiled and not any(getattr(strategy, "uncompiled", "") for strategy in strategies.values())
    casts = products < w and not compiled and not (fsdp and fsdp.param_dtype == "bfloat16")
    offloaded = bool(fsdp and fsdp.cpu_offload) and device != "cpu"
    # Gradients that are there before a step's last backward pass begins: of earlier micro-batches, and DDP's buckets. FSDP in
    # a pipeline has its own only when all micro-batches are done.
    is_fsdp = bool(fsdp) or layout.data_size > 1 and p * t > 1
    several = config.train.micro_batch_size and share > config.train.micro_batch_size * n_flight
    early = p == 1 and several or not is_fsdp and (p > 1 or "ddp" in strategies)

    blocks, head = cost.batch_flops(c, example)
    ranges = stages(tuple(blocks), head, p * v)
    result = []
    for rank in range(p):
        here = ranges[rank::p]
        part, ends = on_rank(weights, ranges, p, rank)
        n = sum(map(len, here))
        n_encoder = sum(max(0, min(x.stop, c.n_layers) - x.start) for x in here)
        n_decoder = n - n_encoder
        is_first, is_last = rank == 0, rank == p - 1

        # Micro-batches whose activations are held; of those, which have been through the loss.
        held = most_held(pipe.schedule, p, n_flight, v, rank) / v if p > 1 else 1
        scored_ahead = {"gpipe": n_flight, "zero_bubble": min(n_flight, p)}.get(pipe.schedule, 1) if p > 1 else 1
        encoder_kept = held * n_encoder * m.kept[0] + held * (m.embedding if is_first else 0)
        kept = encoder_kept + held * n_decoder * m.kept[1]
        kept += held * (m.encoded + (m.encoder_norm if any(c.n_layers - 1 in x for x in here) else 0))
        kept += held * v * m.streams if not is_last else scored_ahead * m.head
        ahead, loss = (scored_ahead * m.head_gradients, m.loss) if is_last else (0.0, 0.0)

        P, G, S = (0.0, 0.0, 0.0) if offloaded else (w * (part + ends).parameters / r, w * (part + ends).parameters / r,
                                                     (part + ends).states)  # fmt: skip
        copies = products * part.products if casts else 0.0
        sharding = fsdp_buffers(layout, [weights.blocks[i].parameters for x in here for i in x], ends, w)
        buffers = CONTEXT if device != "cpu" else 0.0
        if p > 1:  # one for each micro-batch's streams but those that blocks keep, and one for their gradients
            buffers += m.streams * v * ((0 if is_first else max(0.0, n_flight - held)) + (0 if is_last else n_flight))

        always = P + S + buffers + sharding.gathered
        before = always + (G if early else 0.0) + sharding.accumulated
        if pipe and pipe.schedule == "zero_bubble":  # a micro-batch's gradients that wait for their products with activations
            before += n_encoder * m.outputs[0] + n_decoder * m.outputs[1]
        graph = copies if not recomputes else 0.0  # of the whole part, else of the block that is computed again,
        block = copies / n if recomputes else 0.0  # though autocast has them all until the forward pass ends
        tied = w * weights.tokens.parameters if is_first and is_last and c.tie_embeddings else 0.0
        latest, first = (1 if n_decoder else 0), (0 if n_encoder else 1)  # the kinds of the last and the first block
        moments = {
            "in the loss" if is_last else "after the last forward pass": before + kept + copies + ahead + loss,
            "as the backward pass begins": before + kept + graph + 2 * ahead,
            "in the last block's backward pass": before + kept + graph + ahead + m.working[latest] + block + sharding.passing,
            "in the first block's backward pass": always + G + m.kept[first] + m.working[first] + block + tied
            + sharding.accumulated + sharding.at_end,
            "in the optimizer's step": always - sharding.gathered + G,
        }
        if n_encoder and n_decoder:  # whose gradients are there then
            decoders = 0.0 if early else G * n_decoder / n
            now = before + decoders + encoder_kept + graph + ahead
            moments["in the encoder's last block's backward pass"] = now + m.working[0] + block + sharding.passing
        moment = max(moments, key=moments.get)
        result.append(
            Stage(n, P, G, S, kept, copies, ahead + loss, buffers + sum(sharding), moments[moment], moment)
        )
    return result


class Sharding(NamedTuple):
    """Bytes that FSDP2 has beside its shards."""

    gathered: float = 0.0  # parameters
    accumulated: float = 0.0  # gradients of whole parameters, from micro-batch to micro-batch
    passing: float = 0.0  # parameters and gradients on their way, while blocks run backward,
    at_end: float = 0.0  # and at the end of the backward pass


def fsdp_buffers(layout: Layout, blocks: list[float], ends: Numbers, w: int) -> Sharding:
    """Where FSDP2 runs: with [fsdp], and with [ddp] beside other strategies, which is FSDP2 with shards of one rank, in one
    group for the whole part. blocks: numbers in each; w: bytes of a weight."""
    sizes, fsdp = layout.sizes, layout.strategies.get("fsdp")
    is_pipeline = sizes["pipeline"] > 1
    largest, whole = max(blocks), sum(blocks) + ends.parameters
    if fsdp is None:
        if layout.data_size == 1 or sizes["tensor"] * sizes["pipeline"] == 1:
            return Sharding()
        return Sharding(w * whole, w * whole) if is_pipeline else Sharding(w * whole, at_end=w * whole)
    gathered = 2 if fsdp.param_dtype == "bfloat16" else w
    reduced = 2 if fsdp.reduce_dtype == "bfloat16" else 4
    reshards, every = fsdp.reshard_after_forward, sum(blocks)
    # Parameters: the two ends, and with ZeRO-3 the last message of them; while blocks run one block, and the next one.
    parameters = ends.parameters + largest + (0.0 if reshards else every)
    running = 2 * largest if reshards else 0.0
    if is_pipeline:  # torch's stages sum gradients over micro-batches before they scatter them; in the end all is gathered
        left = every - largest if reshards else 0.0
        return Sharding(gathered * parameters, reduced * whole, gathered * running, gathered * left + reduced * largest)
    # The gradient of a block, and the message in which it goes; those of the two ends go last.
    passing, at_end = (gathered * running + (gathered + reduced) * n for n in (largest, max(largest, ends.parameters)))
    return Sharding(gathered * parameters, 0.0, passing, at_end)


ITEMS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer states": "states",
    "activations": "activations",
    "weights cast for products": "copies",
    "logits and their gradients": "logits",
    "buffers and context": "buffers",
}


def text(stages: list[Stage], memory_bytes: float) -> str:
    """A column a rank of the pipeline, a line an item, in GB (1e9 bytes)."""
    rows = [["", *(f"rank {i}" for i in range(len(stages)))], ["blocks", *(str(stage.blocks) for stage in stages)]]
    rows += [[name, *(f"{getattr(stage, key) / 1e9:.3f}" for stage in stages)] for name, key in ITEMS.items()]
    rows += [["peak", *(f"{stage.peak / 1e9:.3f}" for stage in stages)]]
    name, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for first, *rest in rows:
        cells = (cell.rjust(width) for cell, width in zip(rest, others, strict=True))
        lines.append("  ".join([first.ljust(name), *cells]))
    fullest = max(stages, key=lambda stage: stage.peak)
    fits = "fits" if fullest.peak <= memory_bytes else "does not fit"
    lines += ["", f"In GB. Items have their most at different times; rank {stages.index(fullest)} peaks {fullest.moment}."]
    lines += [f"{fullest.peak / 1e9:.1f} GB of {memory_bytes / 1e9:.1f} GB: {fits}."]
    return "\n".join(lines)
