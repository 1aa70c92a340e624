"""Prefix LM: what is predicted, from where, and what each prediction may see."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_spans import UniqueTokens, unique_split

from nanopre.distributed import initialise
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bytes_tokenizer

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
    batch = objective.batch(unique_split(5_000, document=0), np.arange(500), 24, seed=1)
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
    cuts = objective.batch(unique_split(5_000, document=0), np.arange(24_000), 24, seed=1)["visible"]
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
def test_a_token_of_the_text_moves_the_scores_that_may_depend_on_it(architecture):
    """From the corpus to the scores: a token of the suffix changes its own score and later ones, never one before; a token of
    the prefix changes all. For rows cut early, in the middle and late."""
    model, objective = make(architecture)

    def scores(split) -> tuple[int, np.ndarray]:
        """(length of the prefix, -log p of each token of the suffix)."""
        arrays = objective.batch(split, np.array([row]), 24, seed=1)
        batch = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
        targets = batch.pop("targets")[0]
        with torch.no_grad():
            each = F.cross_entropy(model(**batch)[0], targets, reduction="none", ignore_index=IGNORE)
        return arrays["visible"][0], each[targets != IGNORE].numpy()

    cuts = objective.batch(unique_split(500, document=0), np.arange(200), 24, seed=1)["visible"]
    for row in (cuts.argmin(), np.abs(cuts - 12).argmin(), cuts.argmax()):
        split = unique_split(500, document=0)
        first = objective.batch(split, np.array([row]), 24, seed=1)["tokens"][0, 0] - 1000
        p, before = scores(split)
        assert p == cuts[row] and len(before) == 25 - p
        for j in range(25):
            changed = unique_split(500, document=0)
            changed.tokens[(first + j) % 500] += 700
            moved = np.abs(scores(changed)[1] - before) > 1e-6
            assert (moved == (np.arange(p, 25) >= (j if j >= p else 0))).all(), (row, j)


@pytest.mark.parametrize("architecture", MODELS)
def test_rows_depend_on_seed_and_number_alone(architecture):
    _, objective = make(architecture)
    split, rows = unique_split(2_000, document=0), np.array([7, 3, 400, 7])
    together = objective.batch(split, rows, 24, seed=5)
    for i, row in enumerate(rows):
        alone = objective.batch(split, np.array([row]), 24, seed=5)
        assert all((together[key][i] == alone[key][0]).all() for key in together)
    assert (objective.batch(split, rows, 24, seed=6)["tokens"] != together["tokens"]).any()


@pytest.mark.parametrize("architecture", MODELS)
def test_the_loss_is_that_of_full_logits(architecture):
    model, objective = make(architecture)
    arrays = objective.batch(unique_split(2_000, document=0), np.arange(6), 24, seed=2)
    batch = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
    part, counts = model(**batch, loss=objective.loss)["loss"], objective.counts(arrays, UniqueTokens)
    targets = batch.pop("targets")
    expected = F.cross_entropy(model(**batch).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    report = objective.report({"loss": part.item()}, counts)
    assert abs(report["loss"] - expected.item()) < 1e-4
    assert abs(report["bits_per_byte"] - expected.item() / math.log(2) / 2) < 1e-4  # each of these tokens is 2 bytes


@pytest.mark.parametrize("architecture", MODELS)
def test_evaluation_is_fixed_and_ends_where_the_text_ends(architecture):
    _, objective = make(architecture)
    split = unique_split(1_000, document=0)
    n = objective.rows_per_epoch(split, 24)
    batch = objective.batch(split, np.arange(n + 4), 24, None)
    again = objective.batch(split, np.arange(n + 4)[::-1], 24, None)
    assert all((batch[key] == again[key][::-1]).all() for key in batch)
    scored = batch["targets"][batch["targets"] != IGNORE]
    assert len(scored) == len(set(scored)) and (batch["targets"][n:] == IGNORE).all()
    short = objective.batch(unique_split(9, document=0), np.arange(2), 24, None)  # a split that ends in its first row
    assert 1 <= (short["targets"][0] != IGNORE).sum() < 9 and (short["targets"][1] == IGNORE).all()
    first, second = (objective.batch(split, np.arange(n) + e * n, 24, 7)["visible"] for e in (0, 1))
    assert (first != second).any()  # each epoch cuts anew


@pytest.mark.parametrize("architecture", MODELS)
def test_a_sample_reads_its_prompt_as_training_did(architecture):
    tokenizer = bytes_tokenizer()
    model, objective = make(architecture, tokenizer.n_vocab)
    run = SimpleNamespace(model=model, tokenizer=tokenizer)
    text = objective.sample(run, "The cat", {"max_tokens": 9, "temperature": 0})["text"]
    prefix = torch.tensor([list(b"The cat")])

    def continued(visible) -> str:
        tokens, written = prefix, torch.tensor([[tokenizer.pad]])
        for _ in range(9):
            if architecture == "decoder":
                tokens = torch.cat((tokens, model(tokens, visible=visible)[:, -1].argmax(-1, keepdim=True)), dim=1)
            else:
                logits = model(prefix, decoder_tokens=written, visible=visible)
                written = torch.cat((written, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        made = (tokens[0, 7:] if architecture == "decoder" else written[0, 1:]).tolist()
        return tokenizer.decode(made[: made.index(tokenizer.eot)] if tokenizer.eot in made else made)

    with torch.no_grad():
        assert text == "The cat" + continued(torch.tensor([7]))
        assert len(text) > 9
        if architecture == "decoder":
            assert text != "The cat" + continued(None)  # a prompt that is read from left to right is something else
