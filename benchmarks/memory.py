"""What the strategies and optimizers that save memory save, and what they cost.

    OMP_NUM_THREADS=2 python benchmarks/memory.py

One decoder of 10 million parameters, 512 tokens, on the CPU: the activations held at the end of the forward pass, the peak of
a step beyond what it began with, both by torch's profiler; the time of a step, in turns with the plain one; and the bytes of
weights and optimizer states. Written to benchmarks/results/.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from datetime import date
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from nanopre import UserError, machine, optim, parallel  # noqa: E402
from nanopre.command_line import Parser, at_least, run_script  # noqa: E402
from nanopre.config import Train  # noqa: E402
from nanopre.distributed import initialise  # noqa: E402
from nanopre.loss import IGNORE  # noqa: E402
from nanopre.plugins import load_plugins  # noqa: E402

ROWS, T, V = 4, 512, 4096
MODEL = {"d_model": 320, "n_layers": 8, "n_heads": 5, "d_ff": 768}  # llama: 10.6 M parameters with the vocabulary
STRATEGIES = {
    "none": {},
    "selective": {"activation_checkpointing": {"mode": "selective"}},
    "full": {"activation_checkpointing": {"mode": "full"}},
    "offload": {"activation_offload": {}},
    "full and offload": {"activation_checkpointing": {"mode": "full"}, "activation_offload": {}},
}
OPTIMIZERS = {"adamw": "float32", "adamw8bit": "float32", "adamw, bfloat16 weights": "bfloat16", "muon": "float32"}


HERE = machine.choose(Train(device="cpu"))


def build(plugins, strategies: dict, weights: str = "float32") -> torch.nn.Module:
    model = plugins.get("model", "llama", "benchmark")(**MODEL).build(vocab_size=V, seq_len=T)
    initialise(model, 0)
    HERE.choose_attention(model)
    for p in model.parameters():
        p.data = p.data.to(getattr(torch, weights))
    chosen = {name: plugins.get("parallel", name, "benchmark")(**options) for name, options in strategies.items()}
    for strategy in parallel.in_order(chosen).values():
        (model,) = strategy.apply([model], None)
    return model


def forward(model, precision: torch.dtype) -> torch.Tensor:
    tokens = torch.randint(V, (ROWS, T), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        return model(tokens, loss=lambda head, h, _: head.cross_entropy(h, targets)) / targets.numel()


def seconds(model, precision: torch.dtype) -> float:
    began = time.perf_counter()
    forward(model, precision).backward()
    return time.perf_counter() - began


def allocated(run) -> tuple[list[int], object]:
    """The bytes of each allocation and, negative, release of a run, in their order; and what it gives."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())], result


def activations(plugins, strategies: dict, precision: torch.dtype) -> tuple[int, int, int]:
    """Bytes beyond weights and gradients: (held at the end of the forward pass, peak of a step, what of the first would go
    from a GPU to the CPU)."""
    moved = []
    model = build(plugins, strategies)
    seconds(model, precision)  # gradients are there
    if "activation_offload" in strategies:
        # On a CPU nothing moves: what would is counted, each memory once.
        offloaded = sys.modules[plugins.get("parallel", "activation_offload", "benchmark").__module__].Offloaded
        original = offloaded.__init__
        offloaded.__init__ = lambda self, t: (moved.append(t), original(self, t))[1]
    sizes, loss = allocated(lambda: forward(model, precision))
    if "activation_offload" in strategies:
        offloaded.__init__ = original
    memories = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in moved}
    moved.clear()
    back, _ = allocated(loss.backward)
    return sum(sizes), max(accumulate(sizes + back)), sum(memories.values())


def stored(t: torch.Tensor) -> int:
    """Bytes of a tensor; of torchao's 8 bits, those of its parts."""
    if hasattr(t, "__tensor_flatten__"):
        return sum(getattr(t, name).nbytes for name in t.__tensor_flatten__()[0])
    return t.nbytes


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=at_least(1), default=9, help="of steps in turns with the plain one (default: 9)")
    pairs = parser.parse_args(argv).pairs
    plugins = load_plugins()
    precision = HERE.precision
    report = {"date": date.today().isoformat(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    report |= {"load": os.getloadavg()[0], "model": {**MODEL, "vocab_size": V}, "rows": ROWS, "tokens": T, "pairs": pairs}
    report |= {"precision": str(precision), "activations": {}, "optimizers": {}}

    plain = build(plugins, {})
    report["parameters"] = sum(p.numel() for p in plain.parameters())
    seconds(plain, precision)
    print(f"{report['parameters']:,} parameters, {ROWS} rows of {T} tokens, load {report['load']:.1f}")
    for name, strategies in STRATEGIES.items():
        held, peak, moved = activations(plugins, strategies, precision)
        model = build(plugins, strategies)
        seconds(model, precision)
        ratios = [seconds(model, precision) / seconds(plain, precision) for _ in range(pairs)]
        # On a GPU what is offloaded leaves the device, which holds the rest.
        row = {"held": held - moved, "peak_on_cpu": peak, "offloaded": moved}
        row |= {"step_ratio": statistics.median(ratios), "ratios": ratios}
        report["activations"][name] = row
        print(f"{name:18} held {row['held'] / 2**20:7.1f} MiB  offloaded {moved / 2**20:7.1f}  peak {peak / 2**20:7.1f}  "
              f"step x {row['step_ratio']:.2f}")  # fmt: skip

    for name, weights in OPTIMIZERS.items():
        model = build(plugins, {}, weights)
        plugin = plugins.get("optimizer", name.split(",")[0], "benchmark")()
        try:
            optimizers = optim.build(plugin, model)
        except UserError as error:
            print(f"{name:24} left out: {error}")
            continue
        forward(model, precision).backward()
        times = []
        for _ in range(pairs):
            began = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            times.append(time.perf_counter() - began)
        states = sum(stored(t) for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t))
        row = {"weights": sum(p.nbytes for p in model.parameters()), "states": states, "seconds": statistics.median(times[1:])}
        report["optimizers"][name] = row
        print(f"{name:24} weights {row['weights'] / 2**20:6.1f} MiB  states {states / 2**20:6.1f} MiB  "
              f"step {row['seconds'] * 1e3:.0f} ms")  # fmt: skip

    file = ROOT / "benchmarks" / "results" / f"memory-{report['date']}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(file)


if __name__ == "__main__":
    run_script("memory.py", main)
