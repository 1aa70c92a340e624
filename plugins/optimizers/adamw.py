"""AdamW: PyTorch's fused one; and for bfloat16 weights one that rounds at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nanopre import hookimpl
from nanopre.config import at_least, below_one
from nanopre.distributed import derive_seed
from nanopre.optim import adamw_groups


@dataclass
class AdamW:
    """AdamW with decay on matrices and embeddings only (Loshchilov and Hutter, 2019)."""

    lr: float = 3e-4  # peak
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    stochastic_rounding: bool = True  # of bfloat16 weights: up or down at random, so that small updates count on average

    weights = ("float32", "bfloat16")
    mup = True

    def __post_init__(self):
        at_least(self, lr=0, eps=0, weight_decay=0)
        below_one(self, "beta1", "beta2")

    def state_bytes(self, kind: str, n: float) -> float:
        return 8 * n  # two moments, float32 for bfloat16 weights, too

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        groups, betas = adamw_groups(model, self.lr, self.weight_decay), (self.beta1, self.beta2)
        if all(p.dtype == torch.float32 for p in model.parameters()):
            return [torch.optim.AdamW(groups, self.lr, betas, self.eps, fused=True)]
        names = {p: name.replace("_checkpoint_wrapped_module.", "") for name, p in model.named_parameters()}
        return [RoundingAdamW(groups, self.lr, betas, self.eps, names if self.stochastic_rounding else None)]


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW of bfloat16 parameters: moments and the update in float32, one parameter after the other, then rounding.

    An update below half of the distance to the next bfloat16, 1/256 of the weight, is lost if the nearest is taken. At
    random it counts with its probability (Gupta et al., 2015, section 3), for which `names` has each parameter's name: the
    random bits are keyed by it, the step and the shard's place, so that copies on several ranks and resumed runs agree.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float, names: dict[Tensor, str] | None):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})
        self.names = names

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
                state["step"] += 1
                step = int(state["step"])
                mine, gradient, m, v = map(local, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
                gradient = gradient.float()
                m.lerp_(gradient, 1 - beta1)
                v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                deviation = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
                new = mine.float().mul_(1 - lr * group["weight_decay"])
                new.addcdiv_(m, deviation, value=-lr / (1 - beta1**step))
                if self.names:
                    seed = derive_seed("rounding", self.names[p], step, *place(p))
                    new = round_at_random(new, torch.Generator(new.device).manual_seed(seed))
                mine.copy_(new)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # It gives the moments the precision of their parameters: here they have their own.
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = state_dict["state"][key][name].to(p.device, torch.float32, copy=True)


def round_at_random(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to one of the two nearest bfloat16s, the nearer one more likely, so that the mean is x: a bfloat16 is the upper
    half of a float32's bits, to whose lower half random bits are added."""
    noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return (x.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).bfloat16()


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def place(p: Tensor) -> tuple[int, ...]:
    """Where in the whole parameter this rank's part begins."""
    return compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1] if isinstance(p, DTensor) else ()


@hookimpl
def nanopre_optimizers(register):
    register("adamw", AdamW)
