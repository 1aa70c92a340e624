"""What an accelerator can hold, compute and send: the table in accelerators.toml, and a user's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nanopre import UserError
from nanopre.config import read_toml, section
from nanopre.plugins import nearest

SHIPPED = Path(__file__).with_name("accelerators.toml")


@dataclass(frozen=True)
class Accelerator:
    """A GPU, and the network between its like. The fields are the keys of the TOML file, which tells what each means."""

    device: str
    memory_bytes: float
    peak_flops: float  # FLOP/s of dense bfloat16 products
    memory_bandwidth: float  # bytes/s
    node_gpus: int
    node_bandwidth: float  # bytes/s that a GPU sends, inside a node
    network_bandwidth: float  # and between nodes
    price: float = 0.0  # US dollars an hour
    priced: str = ""  # when

    def __post_init__(self):
        for name in ("memory_bytes", "peak_flops", "memory_bandwidth", "node_bandwidth", "network_bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0 and finite")
        if self.node_gpus < 1 or not 0 <= self.price < float("inf"):
            raise ValueError(f"node_gpus = {self.node_gpus}, price = {self.price}: must be at least 1, and at least 0")

    def group_bandwidth(self, ranks: int, stride: int = 1) -> float:
        """Bytes/s at which each GPU of a group sends in a ring, for a group of `ranks` that are `stride` apart, while every
        group like it does the same. A ring through several nodes crosses from one to the next over the network cards of all
        the group's GPUs in a node, and is as slow as its slowest part."""
        in_node = min(ranks, max(1, self.node_gpus // stride))  # of the group
        return self.node_bandwidth if in_node == ranks else min(self.node_bandwidth, in_node * self.network_bandwidth)


def load(file: str | Path | None = None) -> dict[str, Accelerator]:
    """The accelerators by name: the shipped ones, and over them those of `file`. Raises UserError with the file and key."""
    result = {}
    for path in (SHIPPED, *([file] if file else [])):
        result |= {name: section(Accelerator, table, str(path), name) for name, table in read_toml(path).items()}
    return result


def accelerator(name: str, file: str | Path | None = None) -> Accelerator:
    """The accelerator of this name. Raises UserError with the nearest one."""
    known = load(file)
    if name not in known:
        raise UserError(f"--gpu {name}: no such accelerator; {nearest(name, list(known))}")
    return known[name]


def of_device(device_name: str) -> Accelerator | None:
    """The accelerator that torch.cuda.get_device_name names, None for one that the table lacks."""
    matches = [known for known in load().values() if re.search(rf"\b{re.escape(known.device)}\b", device_name)]
    return max(matches, key=lambda known: len(known.device)) if matches else None
