"""Which layout of many accelerators trains a model fastest: all that there are, what refuses some, the time of the rest.

The time of a step is that of the pipeline's slowest stage, by the FLOPs of nanopre/cost.py at a given part of the peak, the
waiting of its schedule, and what is sent meanwhile (docs/parallel.md) on a network of two levels, inside a node and between.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import tomli_w
import torch
from torch import Tensor

from nanopre import UserError, cost, parallel
from nanopre.accelerators import Accelerator
from nanopre.config import Config
from nanopre.distributed import World
from nanopre.model import Transformer
from nanopre.parallel import Layout
from nanopre.planning import memory, preview
from nanopre.planning.memory import Weights
from nanopre.plugins import Registry
from nanopre.timetable import idle

EFFICIENCY = 0.42
"""The part of an accelerator's peak that products reach while nothing is waited for: the median of 70 measured runs of models
of 0.8 to 65 billion parameters on 8 to 512 H100s (MosaicML's llm-foundry; tests/test_planning.py), which lie between 0.31 and
0.59, larger models higher. A run of your own says it better: plan.py layout --calibrate."""


@dataclass
class Candidate:
    """A layout that fits, with what it is predicted to take."""

    parallel: dict[str, dict[str, Any]]  # the [parallel] section; options that are left out have their defaults
    micro_batch_size: int
    sizes: dict[str, int]  # "pipeline", "data", "tensor": ranks
    seconds: float  # of a step
    parts: dict[str, float]  # of these seconds: "compute", "bubble", "tensor", "pipeline", "data", "optimizer"
    mfu: float
    memory_bytes: float  # at the peak of the fullest GPU


@dataclass
class Refusal:
    parallel: dict[str, dict[str, Any]]
    micro_batch_size: int
    reason: str


@dataclass
class Search:
    ranked: list[Candidate]  # fastest first, and of those that are alike the one with the largest micro-batch
    refused: list[Refusal]

    def reasons(self) -> list[tuple[str, int]]:
        """(a sentence, how many layouts were refused with one like it), most first. Alike: but for the numbers."""
        alike: dict[str, list[str]] = {}
        for refusal in self.refused:
            alike.setdefault(re.sub(r"[\d.,]+", "#", refusal.reason), []).append(refusal.reason)
        return sorted(((reasons[0], len(reasons)) for reasons in alike.values()), key=lambda x: -x[1])


def search(config: Config, plugins: Registry, accelerator: Accelerator, gpus: int, efficiency: float = EFFICIENCY) -> Search:
    """Every layout of the config's model and batch on so many accelerators.

    Of the config's own [parallel] what does not concern the layout stays: FSDP's precisions, strategies of the user.
    """
    example, model = preview.example(config), preview.shape(config)
    world = World(0, 0, gpus, torch.device("cpu"))
    counted: dict[tuple[int, int], Weights] = {}
    ranked, refused = [], []
    for strategies, micro in enumerate_layouts(config, plugins, gpus, len(model.blocks)):
        train = dataclasses.replace(config.train, micro_batch_size=micro)
        candidate = dataclasses.replace(config, parallel=strategies, train=train)
        try:
            layout = parallel.plan(candidate, plugins, world, model)
        except UserError as error:
            refused.append(Refusal(table(strategies), micro, str(error)))
            continue
        key = layout.sizes["tensor"], layout.sizes["shard"]
        if key not in counted:
            counted[key] = Weights(model, *key, getattr(config.optimizer, "state_bytes", memory.two_moments))
        stages = memory.estimate(candidate, layout, model, example, weights=counted[key])
        fullest = max(stage.peak for stage in stages)
        if fullest > accelerator.memory_bytes:
            reason = f"it takes {fullest / 1e9:.1f} GB of a GPU's {accelerator.memory_bytes / 1e9:.1f} GB"
            refused.append(Refusal(table(strategies), micro, reason))
            continue
        parts = step_time(candidate, layout, model, example, counted[key], accelerator, efficiency)
        seconds = float(f"{sum(parts.values()):.9g}")  # of equals the last digits differ by the order of their sums
        flops = config.train.batch_size * cost.flops(model.config, example)
        sizes = {"pipeline": layout.sizes["pipeline"], "data": layout.data_size, "tensor": layout.sizes["tensor"]}
        mfu = flops / seconds / gpus / accelerator.peak_flops
        ranked.append(Candidate(table(strategies), micro, sizes, seconds, parts, mfu, fullest))
    return Search(sorted(ranked, key=lambda c: (c.seconds, -c.micro_batch_size)), refused)


def enumerate_layouts(
    config: Config, plugins: Registry, gpus: int, n_blocks: int
) -> Iterator[tuple[dict[str, Any], int]]:
    """(strategies, micro-batch size) of every layout: degrees that multiply to the GPUs, schedules, what is computed again,
    ZeRO's stages 0 (ddp), 2 and 3 (fsdp). GPipe is left out: it takes as long as 1F1B and holds more. So are zero-bubble
    schedules whose blocks are computed again, which they do for each layer's weights anew."""

    def make(name: str, **options):
        given = config.parallel.get(name)
        return dataclasses.replace(given, **options) if given else plugins.get("parallel", name, "parallel")(**options)

    def pipelines(degree: int, microbatches: int) -> list[dict]:
        if degree == 1:
            return [{}]
        even = [v for v in range(2, 9) if n_blocks % (degree * v) == 0] or [2]
        several = [(schedule, v) for schedule in ("interleaved_1f1b", "zero_bubble") for v in even]
        options = {"degree": degree, "microbatches": microbatches}
        return [
            {"pipeline": make("pipeline", **options, schedule=schedule, stages_per_rank=v)}
            for schedule, v in [("1f1b", 0), *several]
        ]

    own = ("ddp", "fsdp", "tensor", "pipeline", "activation_checkpointing")
    rest = {name: strategy for name, strategy in config.parallel.items() if name not in own}
    modes = [make("activation_checkpointing", mode=mode) for mode in ("selective", "full")]
    recomputations = [{}, *({"activation_checkpointing": mode} for mode in modes)]
    sharded = [{"fsdp": make("fsdp", reshard_after_forward=reshard)} for reshard in (False, True)]
    for tensor in divisors(gpus):
        # The stream is split over tokens, too, where their number allows: as many bytes are sent, and fewer are held.
        split = config.train.seq_len % tensor == 0
        tensors = {"tensor": make("tensor", degree=tensor, sequence_parallel=split)} if tensor > 1 else {}
        for degree in divisors(gpus // tensor):
            data = gpus // tensor // degree
            share = max(1, config.train.batch_size // data)
            zeros = [{"ddp": make("ddp")}, *sharded] if data > 1 else [{}]
            for micro in divisors(share):
                for pipeline, again, zero in product(pipelines(degree, share // micro), recomputations, zeros):
                    if again and pipeline and pipeline["pipeline"].schedule == "zero_bubble":
                        continue
                    yield {**pipeline, **tensors, **again, **zero, **rest}, micro


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def table(strategies: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """[parallel] as TOML has it, without what is a default."""
    return {
        name: {f.name: value for f in dataclasses.fields(s) if (value := getattr(s, f.name)) != f.default}
        for name, s in strategies.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Time


def step_time(
    config: Config,
    layout: Layout,
    model: Transformer,
    example: dict[str, Tensor],
    weights: Weights,
    gpu: Accelerator,
    efficiency: float,
) -> dict[str, float]:
    """Seconds of a step, by what takes them: "compute", "bubble", "tensor", "pipeline", "data", "optimizer".

    What tensor groups and stages send is waited for. FSDP's messages go on beside a micro-batch's computation and DDP's beside
    a step's last backward pass: what is longer than that is waited for. In a pipeline gradients are summed at the end.
    """
    c, sizes, s = model.config, layout.sizes, layout.strategies
    p, t, d = sizes["pipeline"], sizes["tensor"], layout.data_size
    pipe, fsdp = s.get("pipeline"), s.get("fsdp")
    v = pipe.stages if pipe else 1
    rows = memory.rows_at_once(config, layout)
    m = config.train.batch_size // d // rows  # micro-batches of a rank in a step
    mode = s["activation_checkpointing"].mode if "activation_checkpointing" in s else "none"
    w = memory.weight_bytes(config)

    # A micro-batch on each rank of the pipeline: its own computation, and what its tensor group sends.
    flops, head = cost.batch_flops(c, example)
    ranges = memory.stages(tuple(flops), head, p * v)
    T, D = (example[key].shape[1] if key in example else 0 for key in ("tokens", "decoder_tokens"))
    # Numbers of the stream that a block sums over the ranks after attention and MLP, and after a decoder's cross-attention.
    summed = [2 * rows * T * c.d_model] * c.n_layers + [3 * rows * D * c.d_model] * c.n_decoder_layers
    micro = memory.of_layout(config, layout, model, example, "cuda", 2)
    passes = 4 / 3 if mode == "full" else 1.0
    # Forward: float32 gathered and products scattered, 6 bytes a number; as many backward. An all-reduce has twice the bytes
    # of either, so that both of them together are the same without sequence_parallel.
    sent = 12 * (1.5 if mode == "full" else 1.0)
    per_byte = (t - 1) / t / gpu.group_bandwidth(t) if t > 1 else 0.0  # seconds, around the ring of a tensor group
    computing, tensor = [], []
    for rank in range(p):
        here = [i for stage in range(rank, p * v, p) for i in ranges[stage]]
        work = rows * (passes * sum(flops[i] for i in here) + (head if rank == p - 1 else 0.0))
        again = 0.0
        if mode == "selective":  # what is computed again is bound by memory: written once and read once
            again = 2 * sum(micro.recomputed[i >= c.n_layers] for i in here) / gpu.memory_bandwidth
        computing.append(work / t / gpu.peak_flops / efficiency + again)
        ends = 8 * rows * (D or T) * c.d_model * ((rank == 0) + (rank == p - 1))  # the embedding's sum, the head's gradient
        tensor.append((sent * sum(summed[i] for i in here) + ends) * per_byte)
    slowest = max(range(p), key=lambda rank: computing[rank] + tensor[rank])
    compute, split = computing[slowest], tensor[slowest]
    stride = d * t  # between a rank and the next one of its pipeline
    link = gpu.node_bandwidth if p * stride <= gpu.node_gpus else gpu.network_bandwidth
    send = 2 * v * micro.streams / link if p > 1 else 0.0

    # Data-parallel ranks: the rank with most parameters.
    def ring(n_bytes: float, ranks: int, stride: int) -> float:
        return n_bytes * (ranks - 1) / ranks / gpu.group_bandwidth(ranks, stride)

    numbers = (blocks + ends for blocks, ends in (memory.on_rank(weights, ranges, p, rank) for rank in range(p)))
    largest = max(numbers, key=lambda n: n.parameters)
    N, r, copies = largest.parameters, sizes["shard"], sizes["replicate"]
    if fsdp:
        gathered, reduced = (2 if kind == "bfloat16" else w for kind in (fsdp.param_dtype, fsdp.reduce_dtype))
        gather = ring(gathered * N, r, t)
        scatter = ring(reduced * N, r, t) + 2 * ring(reduced * N / r, copies, r * t)
        gathers = 2 * gather if fsdp.reshard_after_forward else gather
        if p == 1:
            data = m * max(0.0, gathers + scatter - compute)
        else:
            data = scatter + (m * max(0.0, gathers - compute) if fsdp.reshard_after_forward else gather)
    else:
        data = 2 * ring(w * N, d, t) if d > 1 else 0.0
        data = max(0.0, data - 2 / 3 * compute) if p * t == 1 else data
    if p > 1 and c.tie_embeddings:  # the first and the last stage sum the embedding's gradient
        data += w * weights.tokens.parameters / link

    held = 2 * w * N / r + largest.states  # parameters, gradients and states are read and written once
    return {
        "compute": m * compute,
        "bubble": m * (compute + split + send) * idle(pipe.schedule, p, m, v) if p > 1 else 0.0,
        "tensor": m * split,
        "pipeline": m * send,
        "data": data,
        "optimizer": 2 * held / gpu.memory_bandwidth,
    }


def calibrate(
    config: Config, plugins: Registry, accelerator: Accelerator, gpus: int, seconds: float, where: str
) -> float:
    """The efficiency at which the config's own layout is predicted to take the `seconds` a step that were measured. Raises
    UserError, which names `where`, for a step that is shorter than the peak allows."""
    from scipy.optimize import brentq

    example, model = preview.example(config), preview.shape(config)
    layout = parallel.plan(config, plugins, World(0, 0, gpus, torch.device("cpu")), model)
    weights = Weights(model, layout.sizes["tensor"], layout.sizes["shard"], memory.two_moments)

    def error(efficiency: float) -> float:
        return sum(step_time(config, layout, model, example, weights, accelerator, efficiency).values()) - seconds

    if error(1.0) > 0:
        raise UserError(f"{where}: its steps of {seconds:.3g} s are shorter than {gpus} of these GPUs could make them.")
    return brentq(error, 1e-9, 1.0)


def text(found: Search, gpus: int, efficiency: float) -> str:
    """The best ten as a table, the best one's TOML, and how many were refused, by reason."""
    fastest = "; the fastest:" if found.ranked else "."
    lines = [f"{len(found.ranked):,} layouts fit {gpus:,} GPUs at {efficiency:.2g} of the peak{fastest}"]
    columns = "pipeline  data  tensor  micro-batch  recompute  ZeRO  schedule               s/step    MFU      GB"
    lines += ["", columns] if found.ranked else []
    for c in found.ranked[:10]:
        pipe, fsdp, again = (c.parallel.get(name) for name in ("pipeline", "fsdp", "activation_checkpointing"))
        schedule = pipe.get("schedule", "1f1b") if pipe else "-"
        schedule += f" x {pipe['stages_per_rank']}" if pipe and schedule != "1f1b" else ""
        mode = "none" if again is None else again.get("mode", "full")
        zero = "0" if fsdp is None else "3" if fsdp.get("reshard_after_forward", True) else "2"
        degrees = "{pipeline:8}  {data:4}  {tensor:6}".format(**c.sizes)
        lines.append(
            f"{degrees}  {c.micro_batch_size:11}  {mode:9}  {zero:>4}  {schedule:21}  {c.seconds:6.4g}  {100 * c.mfu:4.1f}%  "
            f"{c.memory_bytes / 1e9:6.1f}"
        )
    if found.ranked:
        best = found.ranked[0]
        shares = ", ".join(f"{name} {100 * s / best.seconds:.1f}%" for name, s in best.parts.items() if s)
        table = {"train": {"micro_batch_size": best.micro_batch_size}}
        table |= {"parallel": best.parallel} if best.parallel else {}
        lines += ["", f"The fastest one's step: {shares}.", "", tomli_w.dumps(table).strip()]
    if found.refused:
        lines += ["", f"{len(found.refused):,} layouts can't be; of those that are alike but for their numbers, one:"]
    lines += [f"{n:7,}  {reason}" for reason, n in found.reasons()]
    return "\n".join(lines)
