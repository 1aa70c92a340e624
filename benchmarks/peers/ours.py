"""nanopre as a worker. Training is train.py itself, with this file as a plugin:

    train.py CONFIG.toml --plugins='["benchmarks/peers/ours.py"]' --loggers.turns={}

and decoding what sample.py does, of a model with its first weights: `python ours.py TOKENS FLAGS OF TRAIN.PY`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch
from turns import Turns

from nanopre import config as configs, hookimpl, machine
from nanopre.distributed import initialise
from nanopre.generate import generate


@dataclass
class TakeTurns:
    """Wait for a turn after each step (benchmarks/turns.py)."""

    @hookimpl
    def nanopre_run_start(self, run):
        self.turns = Turns()

    @hookimpl
    def nanopre_step_end(self, run, step, metrics):
        self.turns.tick()


@hookimpl
def nanopre_loggers(register):
    register("turns", TakeTurns)


def decode(n_tokens: int, flags: list[str]) -> None:
    config, _ = configs.load(os.devnull, flags)
    here = machine.choose(config.train)
    model = config.model.build(vocab_size=config.model.vocab_size, seq_len=config.train.seq_len)
    initialise(model, config.seed)
    machine.lighten(model.to(here.device), config.train)
    generator, turns = torch.Generator(here.device).manual_seed(1), Turns()
    while True:
        list(generate(model, list(range(16)), n_tokens, 0.8, top_k=200, generator=generator))
        turns.tick()


if __name__ == "__main__":
    decode(int(sys.argv[1]), sys.argv[2:])
