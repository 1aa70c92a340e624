"""Which layout of many accelerators trains a model fastest: all that there are, those that can't be, and the time of the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nanopre.accelerators import Accelerator
from nanopre.config import Config
from nanopre.plugins import Registry

EFFICIENCY = 0.5
"""Of the peak, that products reach while nothing else is waited for."""


@dataclass
class Candidate:
    """A layout that fits."""

    parallel: dict[str, dict]  # the [parallel] section, as TOML has it
    micro_batch_size: int
    seconds: float  # of a step
    mfu: float
    memory_bytes: float  # of the fullest GPU, at its peak
    parts: dict[str, float] = field(default_factory=dict)  # seconds, by what takes them


@dataclass
class Search:
    ranked: list[Candidate]  # fastest first
    refused: Counter  # reasons, and how many layouts each has refused


def search(config: Config, plugins: Registry, accelerator: Accelerator, gpus: int, efficiency: float = EFFICIENCY) -> Search:
    """Every layout of the config's model and batch on so many accelerators. [parallel] of the config is not looked at, but
    for options that do not concern the layout (fsdp.param_dtype, for one)."""
    raise NotImplementedError
