"""Pipeline parallelism: the blocks are shared out over ranks in stages, through which micro-batches follow each other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from nanopre import cost, hookimpl
from nanopre.config import at_least
from nanopre.model import ModelConfig, Transformer
from nanopre.parallel import Layout, Shared, normalised
from nanopre.timetable import SCHEDULES, SEVERAL_STAGES, share_out


@dataclass
class Pipeline:
    """Stages of blocks on different ranks, by the schedules of torch.distributed.pipelining.

    Each stage sends its streams on to the next, and their gradients back: per micro-batch, rows x tokens x d_model
    numbers each way, and for an encoder-decoder twice as many.
    """

    degree: int = 2  # ranks
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"] = "1f1b"
    microbatches: int = 8  # in which a batch goes through; with p ranks the pipeline idles (p - 1) / (microbatches + p - 1)
    stages_per_rank: int = 0  # 0: two for interleaved_1f1b and zero_bubble, else one

    phase = "pipeline"

    def __post_init__(self):
        at_least(self, degree=1, microbatches=1, stages_per_rank=0)
        if self.stages_per_rank > 1 and self.schedule not in SEVERAL_STAGES:
            raise ValueError(f"stages_per_rank = {self.stages_per_rank}: {self.schedule} has 1; take interleaved_1f1b")

    @property
    def stages(self) -> int:
        """How many each rank has. The option stays as it was given: another schedule may come to a run that is resumed."""
        return self.stages_per_rank or (2 if self.schedule in SEVERAL_STAGES else 1)

    @property
    def uncompiled(self) -> str:
        return "zero_bubble takes their backward passes in halves" if self.schedule == "zero_bubble" else ""

    def check(self, config, layout: Layout, model: Transformer) -> None:
        """Raises ValueError where the model or batch does not fit the schedule, or PyTorch is too old."""
        if torch.__version__ < (2, 13):  # refuses several sums of the last stage, or to go through autograd.Functions in halves
            raise ValueError(f"stages need PyTorch 2.13 or newer, and here is {torch.__version__}")
        n, stages = len(model.blocks), self.degree * self.stages
        if stages > n:
            fitting = (d for d in range(1, self.degree) if self.degree % d == 0 and d * self.stages <= n)
            fewer = f", or stages_per_rank = {n // self.degree}" if n >= self.degree else ""
            problem = f"{stages} stages are more than the model's {n} block{'s' if n > 1 else ''}"
            raise ValueError(f"{problem}; take degree = {max(fitting, default=1)}{fewer}")
        if self.schedule != "gpipe" and self.microbatches < self.degree:
            raise ValueError(f"{self.schedule} needs at least as many microbatches as ranks; take {self.degree}")
        if self.schedule in SEVERAL_STAGES and self.microbatches % self.degree:
            nearby = -(-self.microbatches // self.degree) * self.degree
            raise ValueError(f"{self.schedule} needs a multiple of {self.degree} microbatches; take {nearby}")
        if self.schedule == "zero_bubble":
            self.check_halves(config, layout, model)
        if hasattr(config.objective, "evaluate"):
            raise ValueError(f"objective {config.objective._plugin_name} decodes as it evaluates, which stages can't")

    def check_halves(self, config, layout: Layout, model: Transformer) -> None:
        """Raises ValueError for what does not let a backward pass go in two halves, for a stage's inputs and for its weights:
        the second half goes backward through the same graph again, from one layer after another."""
        if model.config.architecture == "encoder-decoder":
            raise ValueError('zero_bubble can\'t run an encoder-decoder, which has two streams; take "interleaved_1f1b"')
        if getattr(layout.strategies.get("activation_checkpointing"), "mode", None) == "selective":
            what = 'activation_checkpointing.mode = "selective", which lets it go through a block once'
            raise ValueError(f'zero_bubble goes backward in two halves and can\'t have {what}; take "interleaved_1f1b"')
        if getattr(layout.strategies.get("fsdp"), "reshard_after_forward", False):
            needed = "parallel.fsdp.reshard_after_forward = false"  # a shard is not the parameter that the graph knows
            raise ValueError(f'zero_bubble needs {needed}, to have gathered weights at hand; or take "interleaved_1f1b"')
        if config.train.compile == "on":
            why = "whose compiled backward pass is one piece"
            raise ValueError(f'zero_bubble can\'t have train.compile = "on", {why}; take "off" or "auto"')

    def apply(self, parts: list[nn.Module], layout: Layout) -> list[nn.Module]:
        (model,) = parts
        p, rank = self.degree, layout.rank("pipeline")
        ranges = share_out(*cost.batch_flops(model.config, layout.example), p * self.stages)
        stages = [list(map(str, blocks)) for blocks in ranges]
        layout.has_head = rank == p - 1  # stage s is on rank s % p, so the last one is on the last rank
        mine = [cut(model, stages, s) for s in range(rank, len(stages), p)]

        # Embeddings that are also the output projection, and the biases of relative positions, are on several stages.
        holders: dict[str, list[int]] = {}
        for s in range(len(stages)):
            for name, _ in cut(model, stages, s).named_parameters():
                holders.setdefault(name, []).append(s % p)
        for name, ranks in holders.items():
            if len(ranks) > 1:
                group = self.group(layout, tuple(sorted(set(ranks))))
                if rank in ranks:
                    layout.shared[name] = Shared(group, counts=rank == min(ranks))
        return mine

    def group(self, layout: Layout, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of these ranks of each pipeline, in which this rank is; None for one rank alone."""
        mine = None
        if len(ranks) > 1:
            for line in layout.mesh.mesh.flatten(1).T.tolist():  # the ranks of a pipeline
                group = dist.new_group([line[r] for r in ranks])
                mine = group if layout.world.rank in line else mine
        return mine

    def engine(self, parts: list[nn.Module], layout: Layout, loss: Callable, micro: int) -> Engine:
        return Engine(self, parts, layout, loss, micro)


class Stage(Transformer):
    """A part of a Transformer: takes the streams of the stage before, gives its own, the last one its sums of losses."""

    def __init__(self, config: ModelConfig):
        nn.Module.__init__(self)  # not Transformer's: `cut` gives it its modules
        self.config = config

    def forward(self, *state: Tensor, **batch) -> tuple[Tensor, ...] | Tensor:
        with self.autocast():
            result = super().forward(state=state or None, loss=self.loss, **batch)
        if self.head is None:
            return result
        self.keys = list(result)
        return torch.stack([part.float() for part in result.values()])


def cut(model: Transformer, stages: list[list[str]], s: int) -> Stage:
    """The stage of the model that has stages[s] of its blocks, under their names. Not a copy of the model: copies share their
    hooks, so that FSDP's of one of a rank's stages would run in the other."""
    part = Stage(model.config)
    is_first, is_last = s == 0, s == len(stages) - 1
    tied = is_last and not is_first and model.config.tie_embeddings and model.head.proj is not None
    part.embed = model.embed if is_first else nn.Module() if tied else None
    blocks = {name: model.blocks[name] for name in stages[s]}
    kinds = {"decoder_bias" if hasattr(block, "cross") else "bias" for block in blocks.values()}
    part.relative = nn.ModuleDict({k: copy.deepcopy(bias) for k, bias in model.relative.items() if k in kinds})
    part.blocks = nn.ModuleDict(blocks)
    part.head = model.head if is_last else None
    if tied:
        # A copy under the embedding's name, so that checkpoints and optimizers know it for the same.
        part.embed.tokens = copy.deepcopy(model.embed.tokens)
        part.head = copy.copy(model.head)
        part.head._modules = {**model.head._modules, "proj": copy.copy(model.head.proj)}
        part.head.proj._parameters = {**model.head.proj._parameters, "weight": part.embed.tokens.weight}
    return part


class Engine:
    """Runs batches through the stages, by the schedule."""

    def __init__(self, options: Pipeline, parts: list[nn.Module], layout: Layout, loss: Callable, micro: int):
        self.layout, self.rows, self.group = layout, micro * options.microbatches, layout.mesh.get_group("pipeline")
        self.n, self.last = options.microbatches, parts[-1]
        self.keys: dict[bool, list[str]] = {}
        for part in parts:
            part.autocast, part.loss = layout.autocast, loss
        n_stages, device = options.degree * options.stages, layout.example["tokens"].device
        # The streams between stages: all have their shape and precision told, so that no trial run is needed.
        lengths = [layout.example[key].shape[1] for key in ("tokens", "decoder_tokens") if key in layout.example]
        shapes = [(micro, T // layout.sequence_shards, parts[0].config.d_model) for T in lengths]
        streams = tuple(torch.empty(s, device=device, requires_grad=True) for s in shapes)
        sums = torch.empty(1, device=device, requires_grad=True)
        stages = []
        for i, part in enumerate(parts):
            s = layout.rank("pipeline") + i * options.degree
            is_last = s == n_stages - 1
            stages.append(
                PipelineStage(
                    part, s, n_stages, device, input_args=streams if s else (), output_args=sums if is_last else streams,
                    group=self.group,
                )
            )  # fmt: skip
        # scale_grads would divide the gradient of a tied weight twice.
        schedule = get_schedule_class(SCHEDULES[options.schedule])
        several = options.schedule in SEVERAL_STAGES
        self.schedule = schedule(stages if several else stages[0], self.n, loss_fn=self.loss_of, scale_grads=False)

    def forward_backward(self, batch: dict[str, Tensor], totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """As nanopre.parallel.Accumulation: the sums, 0 where the last stage is not; gradients are this stage's."""
        self.totals, self.sums = totals, 0.0
        for first in range(0, len(batch["tokens"]), self.rows):
            self.run(self.schedule.step, {key: t[first : first + self.rows] for key, t in batch.items()})
        return self.named()

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.totals, self.sums = None, 0.0
        self.run(self.schedule.eval, batch)
        return self.named()

    def run(self, step: Callable, batch: dict[str, Tensor]) -> None:
        options = {} if self.totals is None else {"return_outputs": False}
        step(target=torch.zeros(self.n, device=batch["tokens"].device), **options, **batch)

    def loss_of(self, sums: Tensor, _) -> Tensor:
        """The loss of a micro-batch from the last stage's sums, which are noted."""
        self.sums = self.sums + sums.detach()
        if self.totals is None:
            return sums.sum()
        return normalised(dict(zip(self.last.keys, sums.unbind(), strict=True)), self.totals)

    def named(self) -> dict[str, Tensor | float]:
        """The sums by name. The last stage alone knows the names: it tells the others, once for each kind of pass."""
        training = torch.is_grad_enabled()
        if training not in self.keys:
            told = [self.last.keys if self.layout.has_head else None]
            dist.broadcast_object_list(told, group=self.group, group_src=self.layout.sizes["pipeline"] - 1)
            self.keys[training] = told[0]
        values = self.sums.unbind() if self.layout.has_head else [0.0] * len(self.keys[training])
        return dict(zip(self.keys[training], values, strict=True))


@hookimpl
def nanopre_parallel(register):
    register("pipeline", Pipeline)
