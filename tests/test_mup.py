"""muP: what must not change with the width, and what changes by standard parametrisation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_optim import Odd

from nanopre import UserError, optim
from nanopre.distributed import initialise
from nanopre.model import Transformer
from nanopre.plugins import load_plugins

WIDTHS = (64, 128, 256, 512)


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


def build(plugins, width: int, base: int, family: str = "llama", n_heads: int = 0, seed: int = 0) -> Transformer:
    n_heads = n_heads or width // 32
    model = plugins.get("model", family, "test")(d_model=width, n_layers=2, n_heads=n_heads, mup_base_width=base).build(256, 32)
    initialise(model, seed)
    return model


def step(model, optimizers, tokens) -> float:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def changes(plugins, width: int, base: int, family: str, optimizer: str, n_steps: int = 4) -> dict[str, float]:
    """By how much each place's activations change in a few steps: the root mean square over a batch, of a few seeds."""
    tokens = torch.randint(256, (8, 33), generator=torch.Generator().manual_seed(1))
    sums: dict[str, float] = {}
    for seed in range(3):
        model = build(plugins, width, base, family, seed=seed)
        places = {"block": model.blocks["1"], "query": model.blocks["1"].attn.q, "up": model.blocks["1"].mlp.up, "logits": model.head}
        seen: dict[str, torch.Tensor] = {}

        def keep(name):
            def hook(module, inputs, output):
                seen[name] = output[0] if isinstance(output, tuple) else output

            return hook

        for name, module in places.items():
            module.register_forward_hook(keep(name))
        with torch.no_grad():
            model(tokens[:, :-1])
        before = dict(seen)
        optimizers = optim.build(plugins.get("optimizer", optimizer, "test")(lr=5e-3), model)
        for _ in range(n_steps):
            step(model, optimizers, tokens)
        with torch.no_grad():
            model(tokens[:, :-1])
        for name in places:
            sums[name] = sums.get(name, 0) + (seen[name] - before[name]).square().mean().sqrt().item() / 3
    return sums


def slopes(plugins, family: str, optimizer: str, base: int) -> dict[str, float]:
    """d log(change) / d log(width) of each place, by least squares."""
    measured = [changes(plugins, width, base, family, optimizer) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x = x - x.mean()
    return {name: (x @ torch.tensor([math.log(m[name]) for m in measured]) / (x @ x)).item() for name in measured[0]}


@pytest.mark.parametrize(("family", "optimizer"), [("llama", "adamw"), ("llama", "muon"), ("gpt2", "adamw")])
def test_coordinate_check(plugins, family, optimizer):
    """Yang et al. (2022), appendix D.1: after a few steps activations have changed by as much in a wide model as in a narrow one;
    without muP the change of the logits grows with the width."""
    with_mup, without = slopes(plugins, family, optimizer, base=64), slopes(plugins, family, optimizer, base=0)
    assert all(abs(slope) < 0.2 for slope in with_mup.values()), with_mup
    assert without["logits"] > 0.4, without
    assert without["block"] > 0.3, without
