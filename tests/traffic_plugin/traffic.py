"""A strategy from a third party: it changes nothing, and logs what the ranks send each other in a step."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanopre import hookimpl

KINDS = ("allreduce", "all_reduce", "allgather", "all_gather", "reduce_scatter", "send", "broadcast", "all_to_all")
"""Parts of the names of torch.distributed's operators."""


@dataclass
class Traffic:
    """Log the bytes of each kind of message, and of the parameters that the rank holds, to traffic-RANK.jsonl in the run's
    folder, a line a step."""

    smallest: int = 17  # numbers in a message that counts: what every step sums besides is smaller

    phase = "last"

    def apply(self, parts: list[nn.Module], layout) -> list[nn.Module]:
        COUNTER.bytes.clear()
        COUNTER.smallest = self.smallest
        parameters = {p for part in parts for p in part.parameters()}
        COUNTER.held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters)
        return parts


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes, self.smallest, self.held = Counter(), 17, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        namespace, _, name = function._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional"):
            kind = next((kind for kind in KINDS if name.startswith((kind, f"_{kind}"))), None)
            if kind:
                # The whole message is the largest tensor of a gather or scatter, whichever side that is on.
                given = [t.nbytes for t in tree_leaves([arguments, result]) if isinstance(t, torch.Tensor)]
                n = max(given) if "gather" in kind or "scatter" in kind else given[0]
                if n >= 4 * self.smallest:
                    self.bytes[kind.replace("_", "")] += n
        return result


COUNTER = Counting()


@hookimpl
def nanopre_run_start(run):
    COUNTER.__enter__()


@hookimpl
def nanopre_step_end(run, step, metrics):
    with open(run.dir / f"traffic-{run.rank}.jsonl", "a") as file:
        file.write(json.dumps({**COUNTER.bytes, "held": COUNTER.held}) + "\n")
    COUNTER.bytes.clear()


@hookimpl
def nanopre_run_end(run, status):
    COUNTER.__exit__(None, None, None)


@hookimpl
def nanopre_parallel(register):
    register("traffic", Traffic)
