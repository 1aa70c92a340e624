"""How the ranks share a run: the layout, the strategies in their order, a step's passes, and the norm of all gradients.

A strategy is a plugin of [parallel] (plugins/parallel/). The core owns what they have in common: the mesh, and the sums
that make every layout give the same losses, gradients and norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from nanopre import UserError
from nanopre.config import Config
from nanopre.distributed import World
from nanopre.hookspecs import PHASES
from nanopre.machine import Machine
from nanopre.model import Transformer
from nanopre.plugins import Registry

DIMENSIONS = ("pipeline", "replicate", "shard", "tensor")
"""Of the device mesh. Data-parallel ranks are those of "replicate" x "shard": copies of the model, each in shards."""


@dataclass
class Shared:
    """A parameter of which several pipeline stages hold a copy."""

    group: dist.ProcessGroup | None  # of the ranks that do, None where it is this one alone
    counts: bool  # whether this rank's copy is the one that counts in the norm


@dataclass
class Layout:
    """The ranks as a mesh of pipeline x replicate x shard x tensor, and this one's place in it."""

    world: World
    sizes: dict[str, int]  # of the mesh's dimensions
    strategies: dict[str, object]  # in the order in which they are applied
    mesh: DeviceMesh | None = None  # None for a single process
    autocast: Callable = nullcontext
    example: dict[str, Tensor] = field(default_factory=dict)  # one row of a batch, whose widths all have
    shared: dict[str, Shared] = field(default_factory=dict)  # by the parameter's name
    sequence_shards: int = 1  # between blocks a stream has so many parts, on the ranks of a tensor group
    has_head: bool = True  # whether losses are made on this rank

    def rank(self, dimension: str) -> int:
        return self.mesh.get_local_rank(dimension) if self.mesh else 0

    @property
    def data_size(self) -> int:
        """How many parts a global batch has."""
        return self.sizes["replicate"] * self.sizes["shard"]

    @property
    def data_rank(self) -> int:
        """Which of them is this rank's."""
        return self.rank("replicate") * self.sizes["shard"] + self.rank("shard")

    def own(self, numbers: dict[str, Tensor | float]) -> dict[str, Tensor | float]:
        """The numbers as they enter a sum over all ranks: one rank speaks for those that share a part of the batch."""
        speaks = self.has_head and self.rank("tensor") == 0
        return numbers if speaks else {key: 0.0 for key in numbers}

    def __str__(self) -> str:
        sizes = {"pipeline": self.sizes["pipeline"], "data": self.data_size, "tensor": self.sizes["tensor"]}
        if self.world.size == 1:
            return "1 process"
        product = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        return f"{self.world.size} processes = {product} ({', '.join(self.strategies)})"


# ---------------------------------------------------------------------------------------------------------------------
# Plan: what is impossible is refused here, before anything starts


def plan(config: Config, plugins: Registry, world: World, model: nn.Module | None = None) -> Layout:
    """The layout that the config asks for. Raises UserError where it does not fit the processes, batch or model, which is the
    config's on the device "meta" if it is not given."""
    strategies = in_order(config.parallel)
    by_phase: dict[str, list[str]] = {}
    for name, strategy in strategies.items():
        by_phase.setdefault(strategy.phase, []).append(name)
    for phase in ("pipeline", "tensor", "data"):
        if len(names := by_phase.get(phase, [])) > 1:
            raise UserError(f"parallel.{names[1]}: parallel.{names[0]} is the same kind of strategy; leave one of the two out.")

    def degree(phase: str) -> int:
        return strategies[by_phase[phase][0]].degree if phase in by_phase else 1

    model_parallel = degree("pipeline") * degree("tensor")
    size = world.size
    if size % model_parallel:
        nearby = sorted({max(1, size // model_parallel) * model_parallel, -(-size // model_parallel) * model_parallel})
        factors = " x ".join(f"{phase} {degree(phase)}" for phase in ("pipeline", "tensor") if degree(phase) > 1)
        raise UserError(
            f"parallel: {factors} does not divide {_processes(size)}; take {' or '.join(map(str, nearby))} processes "
            f"(torchrun --nproc-per-node={nearby[-1]})."
        )
    data = size // model_parallel
    if data > 1 and "data" not in by_phase:
        strategies = in_order({**strategies, "ddp": plugins.get("parallel", "ddp", "parallel")()})
        by_phase["data"] = ["ddp"]
    shard = 1
    if "data" in by_phase:
        name = by_phase["data"][0]
        shard = getattr(strategies[name], "degree", 1) or data
        if data % shard:
            nearest = max(n for n in range(1, shard + 1) if data % n == 0)
            ranks = f"{data} data-parallel rank{'s' if data > 1 else ''}"
            raise UserError(f"parallel.{name}.degree = {shard} does not divide the {ranks}; take {nearest}.")
    sizes = {"pipeline": degree("pipeline"), "replicate": data // shard, "shard": shard, "tensor": degree("tensor")}
    # A strategy whose ranks are a single one has nothing to do; those of memory, and what comes last, always have.
    alone = {"pipeline": sizes["pipeline"], "tensor": sizes["tensor"], "data": data}
    strategies = {name: s for name, s in strategies.items() if alone.get(s.phase, 2) > 1}
    layout = Layout(world, sizes, strategies)
    if model is None:
        with torch.device("meta"):  # the shape of the model, without its numbers, whatever its vocabulary will be
            model = config.model.build(vocab_size=64 * sizes["tensor"], seq_len=config.train.seq_len)
    for name, strategy in strategies.items():
        if hasattr(strategy, "check"):
            try:
                strategy.check(config, layout, model)
            except ValueError as error:
                raise UserError(f"parallel.{name}: {error}.") from None
    check_batch(config, layout)  # last, with a number of micro-batches that the schedule can have
    return layout


def in_order(strategies: dict[str, object]) -> dict[str, object]:
    """By their phases, and those of one phase by their names: activation_checkpointing before activation_offload, whose
    tensors are then those that the other leaves."""
    return dict(sorted(strategies.items(), key=lambda item: (PHASES.index(item[1].phase), item[0])))


def check_batch(config: Config, layout: Layout) -> None:
    """Raise UserError where the global batch can't be shared out evenly over data-parallel ranks and micro-batches."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    pieces = _microbatches(layout)
    unit = layout.data_size * (micro or 1) * pieces
    if batch % unit:
        nearby = sorted({max(unit, batch // unit * unit), -(-batch // unit) * unit})
        ranks = layout.data_size
        factors = [f"{ranks} data-parallel ranks"] if ranks > 1 else []
        factors += [f"parallel.pipeline.microbatches = {pieces}"] if pieces > 1 else []
        factors += [f"micro_batch_size = {micro}"] if micro else []
        choices = " or ".join(map(str, nearby))
        share, rest = divmod(batch, layout.data_size * pieces)
        if micro > share > 0 == rest:
            choices += f", or lower micro_batch_size to {share}"
        raise UserError(f"train.batch_size = {batch} is not divisible by {' x '.join(factors)}; take {choices}.")


def _microbatches(layout: Layout) -> int:
    """Into how many micro-batches a pipeline cuts what it takes in; 1 without one."""
    return next((s.microbatches for s in layout.strategies.values() if s.phase == "pipeline"), 1)


def _processes(n: int) -> str:
    return f"{n} process" + ("es" if n > 1 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Apply


def apply(layout: Layout, model: nn.Module, here: Machine, loss: Callable, config: Config, example: dict) -> tuple:
    """(parts, engine): the parts of the model that are this rank's, one or, where a pipeline gives a rank several stages,
    more, and what runs a batch through them. Their parameters keep the whole model's names.

    loss: the objective's. example: a row of the batches to come. Raises UserError for a model that can't be split.
    """
    for name, strategy in layout.strategies.items():
        if strategy.phase in ("pipeline", "tensor") and type(model) is not Transformer:
            objective = config.objective._plugin_name
            problem = f"objective {objective} has more than one model, which can't be split"
            raise UserError(f"parallel.{name}: {problem}; leave it out.")
    share = config.train.batch_size // layout.data_size  # rows of the global batch on this rank,
    micro = config.train.micro_batch_size or share // _microbatches(layout)  # of which so many go through the model at once
    layout.autocast, layout.example = here.autocast, example
    here.choose_attention(model)
    if layout.world.size > 1:
        layout.mesh = init_device_mesh(here.device.type, tuple(layout.sizes.values()), mesh_dim_names=DIMENSIONS)
    parts = wrapped = [model]
    for name, strategy in layout.strategies.items():
        if here.compile and (why := getattr(strategy, "uncompiled", "")):
            here.compile, here.why = False, f"parallel.{name}: {why}"
    compiled = not here.compile  # as far as they are to be
    for strategy in layout.strategies.values():
        if PHASES.index(strategy.phase) > PHASES.index("tensor") and not compiled:
            compile_blocks(parts)
            compiled = True
        wrapped = strategy.apply(wrapped, layout)
        if PHASES.index(strategy.phase) < PHASES.index("data"):  # what comes then may hide the model's config and names
            parts = wrapped
    if not compiled:
        compile_blocks(parts)
    pipeline = next((s for s in layout.strategies.values() if s.phase == "pipeline"), None)
    if pipeline:
        return parts, pipeline.engine(wrapped, layout, loss, micro)
    return parts, Accumulation(wrapped[0], loss, here.autocast, micro)


def compile_blocks(parts: Sequence[nn.Module]) -> None:
    """Block by block: short to compile, as all are alike, and the same code wherever a strategy puts them."""
    for part in parts:
        for block in part.blocks.values():
            block.compile()


class Accumulation:
    """A step without a pipeline: micro-batches one after the other, whose gradients add up."""

    def __init__(self, model: nn.Module, loss: Callable, autocast: Callable, rows: int):
        self.model, self.loss, self.autocast = model, loss, autocast
        self.rows = rows  # that go through the model at once

    def forward_backward(self, batch: dict[str, Tensor], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums of losses over this rank's rows, whose gradients are then in the parameters, summed over the
        data-parallel ranks. totals: what each sum is divided by, which is its number of targets in the global batch."""
        sums: dict[str, Tensor] = {}
        n = len(batch["tokens"])
        for first in range(0, n, self.rows):
            # Ranks meet once a step, in its last micro-batch.
            last = first + self.rows >= n
            with self.model.no_sync() if not last and hasattr(self.model, "no_sync") else nullcontext():
                with self.autocast():
                    parts = self.model(**{key: t[first : first + self.rows] for key, t in batch.items()}, loss=self.loss)
                normalised(parts, totals).backward()
            sums = {key: sums.get(key, 0) + part.detach() for key, part in parts.items()}
        return sums

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums of losses over `rows` rows."""
        with self.autocast():
            return self.model(**batch, loss=self.loss)


def normalised(sums: dict[str, Tensor], totals: dict[str, Tensor]) -> Tensor:
    """The loss. Normalise once: each sum is divided by its number of targets in the whole global batch, so that
    micro-batches, stages and ranks only ever add."""
    return sum(part / totals[key].clamp(min=1) for key, part in sums.items())


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def finish_gradients(layout: Layout, parts: Sequence[nn.Module]) -> None:
    """After the last micro-batch: bring DTensors' gradients to where their parameters are, and sum those of parameters that
    several stages hold."""
    for part in parts:
        for p in part.parameters():
            if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
                p.grad = p.grad.redistribute(placements=p.placements)
    for name, shared in layout.shared.items():
        copies = [p for part in parts for n, p in part.named_parameters() if n == name]
        for p in copies:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        total = sum(_local(p.grad) for p in copies)
        if shared.group:
            dist.all_reduce(total, group=shared.group)
        for p in copies:
            _local(p.grad).copy_(total)


def clip_gradients(layout: Layout, parts: Sequence[nn.Module], max_norm: float) -> Tensor:
    """The norm of all gradients of all ranks together, as a scalar on the device; scales them to `max_norm` where it is
    greater (0: never). A gradient that is not finite makes the norm not finite and is left as it is.

    Each rank adds the squares of what it holds, divided by how many ranks hold the same.
    """
    gradients, weights, seen = [], [], set()
    for part in parts:
        for name, p in part.named_parameters():
            if p.grad is not None:
                shared = layout.shared.get(name)
                counts = shared is None or shared.counts and name not in seen
                seen.add(name)
                gradients.append(_local(p.grad))
                weights.append(1 / _copies(layout, p) if counts else 0.0)
    norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))
    square = (norms.square() * torch.tensor(weights, device=norms.device)).sum().to(layout.world.device)  # if offloaded
    if layout.world.size > 1:
        dist.all_reduce(square)
    norm = square.sqrt()
    # On a CPU it costs nothing to look at the norm, and multiplying by 1 would read and write every gradient; a GPU would wait.
    if max_norm > 0 and not (norm.device.type == "cpu" and norm <= max_norm):
        scale = max_norm / (norm + 1e-6)
        scale = torch.where((scale < 1) & norm.isfinite(), scale, 1.0)
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return norm


def _local(t: Tensor) -> Tensor:
    """What of a tensor is on this rank."""
    return t.to_local() if isinstance(t, DTensor) else t


def _copies(layout: Layout, p: Tensor) -> int:
    """How many ranks of a pipeline stage hold the same numbers of this parameter."""
    n = layout.world.size // layout.sizes["pipeline"]
    if isinstance(p, DTensor):
        for dimension, placement in enumerate(p.placements):
            n //= 1 if placement.is_replicate() else p.device_mesh.size(dimension)
    return n
