"""What the machine decides: device, precision, attention, memory, compilation. Decided once at the start, in this one place."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanopre import UserError
from nanopre.config import Train
from nanopre.model import Attention


@dataclass
class Machine:
    """The choices for this process, and the line that tells them to the user."""

    device: torch.device
    precision: torch.dtype  # of the matrix products; the stream between blocks and optimizer states stay float32
    products: bool  # attention by products of matrices, in place of torch's fused kernel
    compile: bool
    why: str  # it is compiled or not; "" where the config says so
    reasons: list[str]  # of all else

    @property
    def reason(self) -> str:
        """What is chosen and why, in one line."""
        compiled = "compiled" if self.compile else "not compiled"
        return "; ".join([*self.reasons, f"{compiled} ({self.why})" if self.why else compiled])

    def autocast(self):
        """A context in which products run in `precision`."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.precision)

    def choose_attention(self, model: nn.Module) -> None:
        """Every attention of the model trains by products or with the fused kernel, as it was chosen."""
        for module in model.modules():
            if isinstance(module, Attention):
                module.products = self.products


def choose(config: Train) -> Machine:
    """Fill in what the config leaves to the machine. Raises UserError for a device, processors or a compiler
    that are not there."""
    device = choose_device(config.device)
    is_cpu = device.type == "cpu"
    if is_cpu and config.threads:
        if config.threads > (there_are := os.cpu_count()):
            raise UserError(f"train.threads = {config.threads}: more than the {there_are} processors of this machine.")
        torch.set_num_threads(config.threads)
    if is_cpu and config.keep_freed_memory:
        keep_freed_memory()
    fast = has_fast_bfloat16(device)
    bfloat16 = wants_bfloat16(config, device) or config.weights == "bfloat16"
    # On a CPU the backward pass of the fused kernel is the slowest part of a small model's step (attention.py).
    products = is_cpu if config.attention == "auto" else config.attention == "products"
    # On a CPU compiling takes 5 to 70 s and gives 1.0 to 1.2 times the speed (benchmarks/README.md): a choice there.
    compiled = device.type == "cuda" if config.compile == "auto" else config.compile == "on"
    if is_cpu and compiled and not shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        problem = "there is no C++ compiler here; install g++, or let CXX name one"
        raise UserError(f'train.compile = "on": {problem}, or take "off".')
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    n = torch.get_num_threads()
    reasons = [
        f"{name}, {n} thread{'s' if n > 1 else ''}" if is_cpu else name,
        ("bfloat16 weights and products" if config.weights == "bfloat16" else "bfloat16 products" if bfloat16 else "float32")
        + ("" if config.precision != "auto" else " (fast here)" if fast else " (no fast bfloat16 here)"),
        ("attention by products" if products else "fused attention") + (" (faster here)" if config.attention == "auto" else ""),
        *(["freed memory kept"] if is_cpu and config.keep_freed_memory else []),
    ]
    why = "takes long here" if is_cpu and config.compile == "auto" else ""
    return Machine(device, torch.bfloat16 if bfloat16 else torch.float32, products, compiled, why, reasons)


def wants_bfloat16(config: Train, device: torch.device) -> bool:
    """Whether products run in bfloat16, by the config or, where it leaves that open, by the device."""
    return has_fast_bfloat16(device) if config.precision == "auto" else config.precision == "bfloat16"


def lighten(model: nn.Module, config: Train) -> None:
    """Before decoding: bfloat16 weights where the run's products had that precision. Every token reads all weights, and half
    as many bytes take little more than half of the time. Buffers stay: rotary positions need their precision."""
    device = next(model.parameters()).device
    if not wants_bfloat16(config, device):
        return
    for p in model.parameters():
        p.data = p.data.bfloat16()
    if device.type == "cpu" and has_fast_bfloat16(device):
        for module in list(model.modules()):
            for name, layer in module.named_children():
                if isinstance(layer, nn.Linear):
                    setattr(module, name, PackedLinear(layer))


class PackedLinear(nn.Module):
    """A linear layer for decoding on a CPU: its bfloat16 weight lies in memory as oneDNN's products read it. Else they put it
    in that order for every token, which takes as long as the product itself: decoding runs at half of the speed."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)  # 1: rows that are expected
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, self.bias, "none", [], "")


def choose_device(name: str, key: str = "train.device") -> torch.device:
    """The device of this name, for this process's local rank; "auto": the best one this machine has. `key`: what gave the
    name, for the UserError about one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UserError(f'{key} = "{name}": no such device here; choose from auto, cpu, cuda, mps.')
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no CUDA")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RuntimeError("no MPS")
        if device.type == "cuda":
            index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f'{key} = "{name}": no such device here ({reason}); try "auto" or "cpu".') from None
    return device


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step. Left alone it gives large blocks back to the system, and every step
    pays for fresh pages: 1.2 to 1.4 times the step time of a small model. Blocks of more than 32 MiB, whose threshold can't
    be raised, must not be mapped at all for that: they were 14% of a step of GPT-2 124M (benchmarks/README.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products pay: GPUs from Ampere on, and CPUs with AVX512-BF16 or AMX instructions, where they
    took 2.4 times less time at the same loss; elsewhere a CPU emulates them at a loss."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
