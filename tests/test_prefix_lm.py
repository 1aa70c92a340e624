"""Prefix LM: what is predicted, from where, and what each prediction may see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_spans import UniqueTokens, unique_split

from nanopre.distributed import initialise
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins

REGISTRY = load_plugins()
MODELS = {
    "decoder": ("llama", dict(d_model=32, n_layers=2, n_heads=2, d_ff=48)),
    "encoder-decoder": ("t5", dict(d_model=32, n_layers=2, n_heads=2, d_head=16, d_ff=48)),
}


def make(architecture: str, vocab_size: int = 3000, seq_len: int = 24):
    name, options = MODELS[architecture]
    model = REGISTRY.get("model", name, "test")(**options).build(vocab_size, seq_len)
    objective = REGISTRY.get("objective", "prefix_lm", "test")()
    assert objective.adapt(model) is model
    initialise(model, 3)
    for parameter in model.parameters():  # larger weights: what sees a token is moved by it
        parameter.data.mul_(4)
    return model.eval(), objective


@pytest.mark.parametrize("architecture", MODELS)
def test_the_suffix_is_predicted_token_by_token(architecture):
    _, objective = make(architecture)
    batch = objective.batch(unique_split(5_000), np.arange(500), 24, seed=1)
    for i in range(500):
        p, targets = batch["visible"][i], batch["targets"][i]
        window = 1000 + (batch["tokens"][i][0] - 1000 + np.arange(25)) % 5_000  # tokens that follow each other
        if architecture == "decoder":
            assert (batch["tokens"][i] == window[:-1]).all()
            assert (targets[: p - 1] == IGNORE).all() and (targets[p - 1 :] == window[p:]).all()
        else:
            assert (batch["tokens"][i][:p] == window[:p]).all() and (batch["tokens"][i][p:] == UniqueTokens.pad).all()
            n = 25 - p
            assert (targets[:n] == window[p:]).all() and (targets[n:] == IGNORE).all()
            assert batch["decoder_tokens"][i][0] == UniqueTokens.pad
            assert (batch["decoder_tokens"][i][1:n] == window[p:-1]).all()


def test_the_cut_is_uniform():
    objective = make("decoder")[1]
    cuts = objective.batch(unique_split(5_000), np.arange(24_000), 24, seed=1)["visible"]
    counts = np.bincount(cuts, minlength=25)[1:]
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 56.0  # chi-square, 23 degrees: 1 in 10,000


def test_no_score_sees_its_target_and_the_prefix_is_seen_whole():
    """A black box: change a token of a decoder's row, and look which positions' logits move."""
    model, _ = make("decoder")
    tokens, p = torch.arange(1000, 1024).unsqueeze(0), 9
    with torch.no_grad():
        before = model(tokens, visible=torch.tensor([p]))
        for j in range(24):
            changed = tokens.clone()
            changed[0, j] += 500
            moved = (model(changed, visible=torch.tensor([p])) - before).abs().amax(dim=-1)[0] > 1e-6
            expected = torch.arange(24) >= (0 if j < p else j)  # a prefix token moves all, a later one itself and later ones
            assert (moved == expected).all(), j


@pytest.mark.parametrize("architecture", MODELS)
def test_the_loss_is_that_of_full_logits(architecture):
    model, objective = make(architecture)
    arrays = objective.batch(unique_split(2_000), np.arange(6), 24, seed=2)
    batch = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
    part, count = model(**batch, loss=objective.loss)["loss"], objective.counts(arrays, None)["loss"]
    targets = batch.pop("targets")
    expected = F.cross_entropy(model(**batch).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    assert abs(objective.report({"loss": part.item()}, {"loss": count})["loss"] - expected.item()) < 1e-4


@pytest.mark.parametrize("architecture", MODELS)
def test_evaluation_is_fixed_and_ends_where_the_text_ends(architecture):
    _, objective = make(architecture)
    split = unique_split(1_000)
    n = objective.rows_per_epoch(split, 24)
    batch = objective.batch(split, np.arange(n + 4), 24, None)
    again = objective.batch(split, np.arange(n + 4)[::-1], 24, None)
    assert all((batch[key] == again[key][::-1]).all() for key in batch)
    scored = batch["targets"][batch["targets"] != IGNORE]
    assert len(scored) == len(set(scored)) and (batch["targets"][n:] == IGNORE).all()
    first, second = (objective.batch(split, np.arange(n) + e * n, 24, 7)["visible"] for e in (0, 1))
    assert (first != second).any()  # each epoch cuts anew
