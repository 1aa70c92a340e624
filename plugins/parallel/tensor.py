"""Tensor parallelism: each layer's matrices are split over ranks, by columns and rows, and so is the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from nanopre import UserError, hookimpl
from nanopre.config import at_least
from nanopre.loss import IGNORE, LinearCrossEntropy
from nanopre.model import SPLITS, Transformer
from nanopre.parallel import Layout


@dataclass
class TensorParallel:
    """Megatron's splits (Shoeybi et al., 2019, section 3): heads and the MLP's inner width are shared out over ranks.

    Each block's attention and MLP end in a sum over the ranks of rows x tokens x d_model numbers, in the forward and in
    the backward pass. With sequence_parallel (Korthikanti et al., 2022, section 4.2.2) the sum is scattered over the tokens
    and gathered before the next layer, which is as many bytes, and norms and dropout hold a part of the tokens each.
    """

    degree: int = 2  # ranks
    sequence_parallel: bool = False

    phase = "tensor"

    def __post_init__(self):
        at_least(self, degree=1)

    def check(self, config, layout: Layout, model: Transformer) -> None:
        """Raises ValueError for heads that the degree does not divide. The MLP's width and the vocabulary may go to the
        ranks in uneven parts."""
        c, n = model.config, self.degree
        for name in ("n_heads", "n_kv_heads"):
            if (value := getattr(c, name)) % n:
                fitting = math.gcd(n, c.n_heads, c.n_kv_heads)  # which the number of processes is a multiple of, too
                up = -(-value // n) * n
                raise ValueError(f"degree = {n} does not divide {name} = {value}; take {fitting}, or {name} = {up}")
        if self.sequence_parallel and config.train.seq_len % n:
            T = config.train.seq_len
            raise ValueError(f"sequence_parallel: degree = {n} does not divide train.seq_len = {T}; take {-(-T // n) * n}")
        if hasattr(config.objective, "evaluate"):
            raise ValueError(f"objective {config.objective._plugin_name} decodes as it evaluates, which split heads can't")

    def apply(self, parts: list[nn.Module], layout: Layout) -> list[nn.Module]:
        mesh = layout.mesh["tensor"]
        if self.sequence_parallel:
            layout.sequence_shards = self.degree
            for key in ("tokens", "decoder_tokens"):
                if key in layout.example and (T := layout.example[key].shape[1]) % self.degree:
                    needs = f"sequence_parallel needs {key} of a length that {self.degree} divides"
                    raise UserError(f"parallel.tensor: {needs}, and the objective makes {T}; leave sequence_parallel out.")
        for part in parts:
            self.split(part, mesh)
        return parts

    def split(self, part: Transformer, mesh: DeviceMesh) -> None:
        plan = {name: style for name, module in part.named_modules() if (style := self.style(name, module))}
        tied = part.head is not None and part.embed is not None and part.head.proj.weight is part.embed.tokens.weight
        parallelize_module(part, mesh, plan)
        if tied:  # which parallelize_module has undone
            part.head.proj.weight = part.embed.tokens.weight
        whole = [name for name in plan if name.split(".")[-1] in SPLITS and not split_weight(part.get_submodule(name))]
        assert not whole, f"not split: {whole}"  # a name that parallelize_module does not find is a warning to it
        if part.head is not None:
            part.head.linear_cross_entropy = VocabularyParallel(mesh)
        if part.embed is not None and hasattr(part.embed, "dropout"):
            part.embed.tokens.register_forward_hook(settle)
        if self.sequence_parallel:
            if part.embed is not None:
                part.embed.register_forward_hook(
                    lambda module, inputs, state: tuple(redistribute(h, mesh, Replicate(), Shard(1)) for h in state)
                )
            if part.head is not None:
                part.head.register_forward_pre_hook(
                    lambda module, state: tuple(redistribute(h, mesh, Shard(1), Replicate()) for h in state)
                )

    def style(self, name: str, module: nn.Module):
        """How torch splits the module of this name: what SPLITS says of layers, and what follows for those around them."""
        kind = name.split(".")[-1]
        stream = Shard(1) if self.sequence_parallel else Replicate()  # between layers
        in_block = name.startswith("blocks.")
        match SPLITS.get(kind):
            case "column":  # in uneven parts, which a local tensor does not tell, the result stays a DTensor until "row"
                return ColwiseParallel(use_local_output=module.weight.shape[0] % self.degree == 0)
            case "row":
                return RowwiseParallel(output_layouts=stream)
            case "vocab" if isinstance(module, nn.Embedding):
                return RowwiseParallel(input_layouts=Replicate())
            case "vocab":
                return ColwiseParallel(output_layouts=Replicate())
        if in_block and kind in ("attn", "mlp"):  # gathered once for all projections, and their gradients summed once
            return PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
        if in_block and kind == "cross":
            return PrepareModuleInput(
                input_layouts=(stream,), desired_input_layouts=(Replicate(),),
                input_kwarg_layouts={"source": stream}, desired_input_kwarg_layouts={"source": Replicate()},
            )  # fmt: skip
        if name.startswith("relative."):  # each rank takes the biases of its heads
            return PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(0))
        if kind in ("q_norm", "k_norm") and not isinstance(module, nn.Identity):
            return SequenceParallel(sequence_dim=1, use_local_output=True)  # of (B, heads, T, D): heads instead of tokens
        if in_block and self.sequence_parallel and kind.endswith("_norm") and not isinstance(module, nn.Identity):
            return SequenceParallel(use_local_output=True)
        return None


def split_weight(module: nn.Module) -> bool:
    return isinstance(module.weight, DTensor) and not module.weight.placements[0].is_replicate()


def settle(module: nn.Module, inputs: tuple, h: Tensor) -> Tensor:
    """The sum over ranks is a tensor that waits for itself when it is used; where the first to use it is a compiled block
    under FSDP, the embedding's gradient would be 0, without an error. So it is used here."""
    return h.clone()


def redistribute(h: Tensor, mesh: DeviceMesh, have, want) -> Tensor:
    return DTensor.from_local(h, mesh, [have], run_check=False).redistribute(placements=[want]).to_local()


class VocabularyParallel:
    """nanopre.loss.LinearCrossEntropy where each rank has a part of the vocabulary (Shoeybi et al., 2019, section 3): the
    logits never leave their rank; per target, three numbers are shared."""

    def __init__(self, mesh: DeviceMesh):
        self.group, self.rank, self.n = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def __call__(self, h: Tensor, weight: DTensor, bias: DTensor | None, targets: Tensor, count_correct: bool):
        first = self.rank * -(-weight.shape[0] // self.n)  # each rank but the last has as many rows
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
        return _Function.apply(h, weight, bias, targets, first, self.group)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, targets, first, group) -> tuple[Tensor, Tensor]:
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        with torch.autocast(device, enabled=False):
            return _Function._forward(ctx, h, weight, bias, targets, first, group, dtype)

    @staticmethod
    def _forward(ctx, h, weight, bias, targets, first: int, group, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with_gradient = any(ctx.needs_input_grad)
        w, n_local = weight.to(dtype), weight.shape[0]
        h_gradient = torch.zeros_like(h, dtype=torch.float32)
        w_gradient = torch.zeros_like(weight)
        b_gradient = None if bias is None else torch.zeros_like(bias)
        total, correct = (torch.zeros((), device=h.device) for _ in range(2))
        rows = max(1, LinearCrossEntropy.LOGITS_PER_CHUNK // n_local)
        for h_part, t_part, g_part in zip(h.split(rows), targets.split(rows), h_gradient.split(rows), strict=True):
            x = h_part.to(dtype)
            logits = (x @ w.T).float()  # (n, V / ranks)
            logits = logits if bias is None else logits.add_(bias)
            index = t_part - first
            here, has_target = (index >= 0) & (index < n_local), t_part != IGNORE
            index = index.clamp(0, n_local - 1).unsqueeze(1)
            top = logits.amax(dim=1)
            dist.all_reduce(top, dist.ReduceOp.MAX, group)
            of_target = torch.where(here, logits.gather(1, index).squeeze(1), 0.0)
            exponentials = logits.sub_(top.unsqueeze(1)).exp_()
            both = torch.stack((exponentials.sum(dim=1), of_target))
            dist.all_reduce(both, group=group)
            normaliser, of_target = both
            total += ((top + normaliser.log() - of_target) * has_target).sum()
            correct += ((of_target >= top) & has_target).sum()
            if with_gradient:
                gradient = exponentials.div_(normaliser.unsqueeze(1))  # softmax - one_hot(target), 0 without a target
                gradient.scatter_add_(1, index, -here.unsqueeze(1).float())
                gradient = gradient.mul_(has_target.unsqueeze(1))
                if b_gradient is not None:
                    b_gradient += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                g_part.copy_(gradient @ w)
                w_gradient += gradient.T @ x
        ctx.mark_non_differentiable(correct)
        if with_gradient:
            dist.all_reduce(h_gradient, group=group)
            ctx.save_for_backward(h_gradient.to(h.dtype), w_gradient, b_gradient)
        return total, correct

    @staticmethod
    def backward(ctx, scale: Tensor, _) -> tuple:
        gradients = (None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors)
        return *gradients, None, None, None


@hookimpl
def nanopre_parallel(register):
    register("tensor", TensorParallel)
