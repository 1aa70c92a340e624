"""Replaced-token detection: what is fake, what is counted, and both losses, against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import read_log, run_script

from nanopre import UserError
from nanopre.config import build_plugin
from nanopre.data import Split
from nanopre.distributed import initialise
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bytes_tokenizer

REGISTRY = load_plugins()


def objective(**options):
    return build_plugin(REGISTRY, "objective", {"name": "electra", **options}, "objective")


def adapted(o, name="bert", **options):
    family = build_plugin(REGISTRY, "model", {"name": name, "d_model": 32, "n_layers": 2, "n_heads": 4, **options}, "model")
    model = o.adapt(family.build(vocab_size=384, seq_len=24))
    initialise(model, 1)
    return model


@pytest.fixture(scope="module")
def split() -> Split:
    tokenizer, draw = bytes_tokenizer(), np.random.default_rng(0)
    tokens = draw.integers(0, 256, 900).astype(np.uint16)
    documents = np.array([0, 200, 210, 500, 900])
    tokens[documents[1:] - 1] = tokenizer.eot
    return Split(tokens, documents, documents, 900, tokenizer)


def tensors(arrays):
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


@pytest.mark.parametrize("seed", [3, None])
def test_targets_are_masked_and_nothing_else_is_changed(split, seed):
    o, tokenizer = objective(), split.tokenizer
    n = o.rows_per_epoch(split, 24)
    batch = o.batch(split, np.arange(n), 24, seed)
    tokens = batch["tokens"].copy()
    for row, positions, targets, visible in zip(
        tokens, batch["positions"], batch["targets"], batch["visible"], strict=True
    ):
        places = positions[targets != IGNORE]
        assert set(np.flatnonzero(row == tokenizer.mask)) == set(places)
        assert len(set(places)) == len(places) == max(1, round(0.15 * visible))
        row[places] = targets[targets != IGNORE]
    text = np.concatenate([row[1 : visible - 1] for row, visible in zip(tokens, batch["visible"], strict=True)])
    if seed is None:
        assert text.tolist() == split.tokens.tolist()
    assert not (batch["targets"] == tokenizer.eot).any()


@pytest.mark.parametrize("family", ["bert", "modern_encoder"])
@pytest.mark.parametrize("seed", [3, None])
def test_both_losses_are_those_of_a_plain_computation(split, family, seed):
    o = objective(discriminator_weight=7.0)
    model = adapted(o, family)
    n = o.rows_per_epoch(split, 24)
    arrays = o.batch(split, np.arange(n - 5, n + 3), 24, seed)  # with seed None the last rows are beyond the end
    batch, seen = tensors(arrays), {}

    def spy(head, h, given):
        seen.update(given, h=h)
        return o.loss(head, h, given)

    sums = model(**batch, loss=spy)
    counts = o.counts(arrays, split.tokenizer)
    metrics = o.report({key: value.item() for key, value in sums.items()}, counts)
    assert sums.keys() == counts.keys()

    # The generator as a masked language model on its own.
    generator, inputs = model.generator, {"tokens": batch["tokens"], "visible": batch["visible"]}
    logits = generator(**inputs)
    chosen = logits.gather(1, batch["positions"].unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    expected = F.cross_entropy(chosen.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE).item()
    assert metrics["generator_loss"] == pytest.approx(expected, rel=1e-5)

    # The discriminator on the generator's samples, token by token.
    filled = {}
    generator(**inputs, loss=lambda head, h, _: filled.update(model.generate(head, h, batch)) or {})
    tokens, total, right, fakes, n_tokens = batch["tokens"].clone(), 0.0, 0, 0, 0
    truth = torch.zeros_like(tokens, dtype=torch.bool)
    for i in range(len(tokens)):
        for slot, target in enumerate(batch["targets"][i].tolist()):
            if target != IGNORE:
                position, sample = batch["positions"][i, slot], filled["samples"][i, slot]
                tokens[i, position], truth[i, position] = sample, sample != target
    assert (seen["fake"] == truth).all()
    hidden = {}
    super(type(model), model).forward(tokens, loss=lambda head, h, _: hidden.update(h=h) or {}, visible=batch["visible"])
    logits = model.head.outputs["fake"](hidden["h"]).squeeze(-1)
    for i in range(len(tokens)):
        if (batch["targets"][i] != IGNORE).any():
            for j in range(batch["visible"][i]):
                p = torch.sigmoid(logits[i, j])
                total -= torch.log(p if truth[i, j] else 1 - p).item()
                right += int((p > 0.5) == truth[i, j])
                fakes += int(truth[i, j])
                n_tokens += 1
    assert counts["discriminator"] == n_tokens
    assert metrics["discriminator_loss"] == pytest.approx(total / n_tokens, rel=1e-4)
    assert metrics["discriminator_accuracy"] == pytest.approx(right / n_tokens)
    assert metrics["fakes"] == pytest.approx(fakes / n_tokens)
    assert 0.05 < metrics["fakes"] < 0.2
    assert metrics["loss"] == pytest.approx(metrics["generator_loss"] + 7 * metrics["discriminator_loss"], rel=1e-5)


def test_a_sample_that_hits_the_original_is_real(split):
    o = objective()
    model, batch = adapted(o), tensors(o.batch(split, np.arange(8), 24, 3))
    model.sample = lambda head, h, uniform: batch["targets"].clamp(min=0)  # a generator that is always right
    sums = model(**batch, loss=o.loss)
    assert sums["fakes"] == 0
    model.sample = lambda head, h, uniform: (batch["targets"] + 1).clamp(min=0)  # never right
    assert model(**batch, loss=o.loss)["fakes"] == (batch["targets"] != IGNORE).sum()


def test_samples_follow_the_generators_distribution():
    model = adapted(objective())
    h = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)) * 3
    head = model.generator.head
    with torch.no_grad():
        head.proj.bias.copy_(torch.randn(384, generator=torch.Generator().manual_seed(1)) * 2)
        p = head.proj(head.before_projection(h)).softmax(-1).flatten()
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(2))
    samples = model.sample(head, h.expand(20_000, 1, -1), uniform).flatten()
    counts = torch.bincount(samples, minlength=384)
    common = p > 2e-3  # at least 40 expected each
    error = (counts[common] - 20_000 * p[common]) / (20_000 * p[common] * (1 - p[common])).sqrt()
    assert common.sum() > 30
    assert error.abs().max() < 4.5
    ends = model.sample(head, h.expand(2, 1, -1), torch.tensor([[0.0], [1 - 2**-24]])).flatten()
    assert (p[ends] > 0).all()


def test_samples_depend_on_the_seed_and_the_row_alone(split):
    o = objective()
    model = adapted(o)

    def made(rows, seed):
        batch, seen = tensors(o.batch(split, rows, 24, seed)), {}
        model(**batch, loss=lambda head, h, given: seen.update(given) or {})
        return seen["fake"]

    for seed in (3, None):
        together = made(np.arange(8), seed)
        assert (together == torch.cat([made(np.array([i]), seed) for i in range(8)])).all()
    uniform = o.batch(split, np.arange(4000), 24, 3)["uniform"]
    assert 0 <= uniform.min() < 0.001 < 0.999 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 * (1 / 12 / uniform.size) ** 0.5


def test_gradients_go_where_they_should(split):
    # The generator learns from its own loss alone: samples carry no gradient (Clark et al., 2020, section 2).
    o = objective()
    model, batch = adapted(o), tensors(o.batch(split, np.arange(8), 24, 3))
    model(**batch, loss=o.loss)["discriminator"].backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(name.startswith("generator.") for name in names)
    model.zero_grad()
    sum(model(**batch, loss=o.loss).values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= {"embed.segments.weight"} or not without
    assert model.generator.embed.tokens[0].weight is model.embed.tokens.weight is model.generator.head.proj.weight


def test_the_generator_is_a_small_one_and_the_model_keeps_its_names():
    o = objective()
    model = adapted(o)
    small = model.generator.config
    assert (small.d_model, small.n_heads, small.head_dim, small.d_ff) == (8, 1, 8, 32)
    family = build_plugin(REGISTRY, "model", {"name": "bert", "d_model": 32, "n_layers": 2, "n_heads": 4}, "model")
    plain = {name for name, _ in family.build(vocab_size=384, seq_len=24).named_parameters() if not name.startswith("head.")}
    mine = {name for name, _ in model.named_parameters()}
    assert plain <= mine
    assert {name for name in mine - plain if not name.startswith("generator.")} == {
        "head.outputs.fake.weight",
        "head.outputs.fake.bias",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mask_fraction": 2.0}, "between 0 and 1"), ({"discriminator_weight": 0.0}, "greater than 0"),
     ({"generator_size": -1.0}, "at least 0")],
)  # fmt: skip
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        objective(**options)


def test_a_run_learns_and_resumes(tiny, tmp_path):
    model = ["--model.name=bert", "--model.d_model=32", "--model.n_heads=4", "--model.n_layers=2", "--model.positions=rope"]
    arguments = [*tiny, *model, "--objective.name=electra", "--objective.discriminator_weight=5.0", "--checkpoint.interval=6"]
    result = run_script("train.py", *arguments)
    assert result.returncode == 0, result.stderr
    steps, evaluations = read_log(tmp_path / "runs" / "tiny")
    assert steps[-1]["loss"] < steps[0]["loss"]
    whole = evaluations[-1]["val_loss"]

    (tmp_path / "runs" / "tiny" / "checkpoints" / "latest").write_text("step_00000006\n")
    result = run_script("train.py", "--resume", tmp_path / "runs" / "tiny")
    assert result.returncode == 0, result.stderr
    assert read_log(tmp_path / "runs" / "tiny")[1][-1]["val_loss"] == whole
