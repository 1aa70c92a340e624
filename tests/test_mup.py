"""muP: what must not change with the width, and does by standard parametrisation; and what must not notice it."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import read_log

import train
from nanopre import UserError, hf, optim
from nanopre.distributed import initialise
from nanopre.model import Transformer
from nanopre.plugins import load_plugins

WIDTHS = (64, 128, 256)


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(256, (8, 33), generator=torch.Generator().manual_seed(1))


def build(plugins, width: int, base: int, family: str = "llama", head: int = 32) -> Transformer:
    options = dict(d_model=width, n_layers=2, n_heads=width // head, mup_base_width=base)
    model = plugins.get("model", family, "test")(**options).build(256, 32)
    initialise(model, 0)
    return model


def make_optimizers(plugins, name: str, model: Transformer, lr: float) -> list:
    plugin = plugins.get("optimizer", name, "test")(lr=lr)
    plugin._plugin_name = name
    return optim.build(plugin, model)


def step(model, optimizers, tokens) -> float:
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def changes(plugins, tokens, width: int, base: int, family: str, optimizer: str) -> dict[str, float]:
    """By how much each place's activations change in four steps: the root mean square over a batch."""
    model = build(plugins, width, base, family)
    block = model.blocks["1"]
    places = {"block": block, "query": block.attn.q, "mlp": block.mlp.up, "logits": model.head}
    seen: dict[str, torch.Tensor] = {}

    def see() -> dict[str, torch.Tensor]:
        for name, module in places.items():
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: output[0] if isinstance(output, tuple) else output})
            )
        with torch.no_grad():
            model(tokens[:, :-1])
        return dict(seen)

    before, optimizers = see(), make_optimizers(plugins, optimizer, model, 5e-3)
    for _ in range(4):
        step(model, optimizers, tokens)
    after = see()
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in places}


def slopes(plugins, tokens, family: str, optimizer: str, base: int) -> dict[str, float]:
    """d log(change) / d log(width) of each place, by least squares."""
    measured = [changes(plugins, tokens, width, base, family, optimizer) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x = x - x.mean()
    return {name: (x @ torch.tensor([math.log(m[name]) for m in measured]) / (x @ x)).item() for name in measured[0]}


@pytest.mark.parametrize(("family", "optimizer"), [("llama", "adamw"), ("llama", "muon"), ("gpt2", "adamw")])
def test_coordinate_check(plugins, tokens, family, optimizer):
    """Yang et al. (2022), appendix D.1: after a few steps activations have changed by as much in a wide model as in a narrow
    one; without muP they change by more, the wider it is."""
    with_mup = slopes(plugins, tokens, family, optimizer, base=64)
    without = slopes(plugins, tokens, family, optimizer, base=0)
    assert all(abs(slope) < 0.3 for slope in with_mup.values()), with_mup
    assert all(slope > 0.45 for slope in without.values()), without


def test_at_its_base_width_with_heads_of_64_it_is_the_standard_parametrisation(plugins, tokens):
    losses = []
    for base in (0, 128):
        model = build(plugins, 128, base, head=64)
        optimizers = make_optimizers(plugins, "adamw", model, 1e-3)
        losses.append([step(model, optimizers, tokens) for _ in range(3)])
    assert losses[0] == losses[1]


def test_rates_and_first_weights_are_those_of_table_8(plugins):
    """Adam's column: hidden matrices 1/fan_in of the rate and of the variance; input and output weights keep theirs."""
    narrow, wide = build(plugins, 64, 64), build(plugins, 256, 64)
    ratio = {name: (p.std() / dict(narrow.named_parameters())[name].std()).item() for name, p in wide.named_parameters()}
    assert ratio["blocks.0.attn.q.weight"] == pytest.approx(0.5, rel=0.05)
    assert ratio["blocks.1.mlp.down.weight"] == pytest.approx(0.5, rel=0.05)
    assert ratio["embed.tokens.weight"] == pytest.approx(1, rel=0.05)
    assert ratio["head.proj.weight"] == pytest.approx(1, rel=0.05)
    assert wide.head.scale == 0.25

    (adamw,) = make_optimizers(plugins, "adamw", wide, 1e-3)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in adamw.param_groups for p in group["params"]}
    assert rates[id(wide.blocks["0"].mlp.up.weight)] == (2.5e-4, 0.4)  # rate times decay stays
    assert rates[id(wide.embed.tokens.weight)] == rates[id(wide.head.proj.weight)] == (1e-3, 0.1)
    assert rates[id(wide.head.norm.weight)] == (1e-3, 0.0)


def test_an_optimizer_without_a_rule_for_it_is_refused(plugins):
    class Plain:
        _plugin_name = "plain"

        def build(self, model):
            return [torch.optim.SGD(model.parameters(), 0.1)]

    with pytest.raises(UserError, match='mup_base_width: optimizer "plain" has no rule for muP'):
        optim.build(Plain(), build(plugins, 64, 64))
    assert optim.build(Plain(), build(plugins, 64, 0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_export_computes_the_same_without_it(plugins, tokens, family):
    """Tied embeddings leave no place for the scale of the logits but the last norm."""
    options = dict(d_model=128, n_layers=2, n_heads=8, tie_embeddings=True, mup_base_width=32)
    model = plugins.get("model", family, "test")(**options).build(256, 32)
    initialise(model, 0)
    state, config = hf.without_mup(model.state_dict(), model.config)
    assert config.mup_base_width == 0 and hf.family_for(config, "test").model == family
    plain = Transformer(config)
    plain.load_state_dict(state)
    with torch.no_grad():
        expected = model(tokens[:, :-1])
        assert (plain(tokens[:, :-1]) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_ranks_that_share_matrices_train_as_one(tiny, tmp_path, ranks):
    """Tensor parallelism: the scale of the logits, and each group's rate."""
    options = ["--model.mup_base_width=8", "--model.n_kv_heads=2", "--train.steps=4", "--name=one"]
    train.main([*tiny, *options])
    one = [line["loss"] for line in read_log(tmp_path / "runs" / "one")[0]]
    results = ranks.run(2, train.main, [*tiny, *options, "--name=two", "--parallel.tensor.degree=2"])
    assert [error for _, _, error in results] == [None, None]
    two = [line["loss"] for line in read_log(tmp_path / "runs" / "two")[0]]
    assert two == pytest.approx(one, abs=2e-5)
