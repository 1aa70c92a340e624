"""BART's infilling and UL2's mixture: the text is rebuilt, each has the rates and laws that it states."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from test_spans import UniqueTokens, rebuild, unique_split

from nanopre import UserError
from nanopre.distributed import initialise
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins

REGISTRY = load_plugins()
BART, UL2 = (REGISTRY.get("objective", name, "test") for name in ("bart", "ul2"))
MASK = 2


def masked_split(n: int):
    """test_spans' vocabulary and documents, with a mask."""
    split = unique_split(n)
    split.tokenizer.mask = MASK
    return split


# ---------------------------------------------------------------------------------------------------------------------
# BART


@given(
    seq_len=st.integers(2, 90),
    share=st.floats(0, 1),
    mean=st.floats(0.1, 12),
    n=st.integers(1, 900),
    seed=st.one_of(st.none(), st.integers(0, 2**40)),
    first=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_infilling_hides_its_share_and_the_target_is_the_text(seq_len, share, mean, n, seed, first):
    objective, split, length = BART(share, mean), masked_split(n), seq_len - 1
    first = first % objective.rows_per_epoch(split, seq_len) if seed is None else first
    batch = objective.batch(split, np.arange(first, first + 3), seq_len, seed)
    for i in range(1 if seed is None else 3):
        text = batch["decoder_tokens"][i][1:]
        assert batch["decoder_tokens"][i][0] == UniqueTokens.pad
        assert (text == 1000 + (text[0] - 1000 + np.arange(length)) % n).all()
        targets = np.append(text, UniqueTokens.eot)
        scored = batch["targets"][i] != IGNORE
        assert (batch["targets"][i][scored] == targets[scored]).all() and (scored.all() or seed is None)
        end = batch["visible"][i] - 1
        row = batch["tokens"][i]
        assert row[end] == UniqueTokens.eot and (row[end + 1 :] == UniqueTokens.pad).all()
        kept = [int(token) for token in row[:end] if token != MASK]
        places = [(token - int(text[0])) % n for token in kept] if n >= length else None
        if places is not None:
            assert places == sorted(set(places))  # what stays is a part of the text in its order
            hidden = length - len(kept)
            assert hidden == math.ceil(Fraction(str(share)) * length)
            if places and hidden:  # where tokens are missing between two that stay, there is a mask
                padded = [-1, *places, length]
                row_with_edges = [None, *row[:end].tolist(), None]
                for a, b in zip(padded, padded[1:], strict=False):
                    if b - a > 1:
                        at = 0 if a < 0 else row_with_edges.index(int(text[a]))
                        assert row_with_edges[at + 1] == MASK


def test_infilling_has_poisson_lengths_and_its_share():
    """Lengths of the spans between tokens that stay, where they are one mask each: P(0) = e**-3 of all masks insert."""
    objective, split = BART(), masked_split(100_000)
    batch = objective.batch(split, np.arange(1000), 128, seed=1)
    n_masks = (batch["tokens"] == MASK).sum()
    hidden = 1000 * 127 - ((batch["tokens"] >= 1000).sum())
    assert hidden == 1000 * math.ceil(0.3 * 127)  # exactly: spans are drawn until the budget is spent
    assert abs(hidden / n_masks - 3.0) < 0.15  # the last span of each row is cut short
    cumulative, p0 = objective.cumulative() / 2**32, math.exp(-3)
    assert abs(cumulative[0] - 3 * p0 / (1 - p0)) < 1e-9 and abs(cumulative[2] - 12 * p0 / (1 - p0)) < 1e-9
    assert abs(cumulative[-1] - 1) < 1e-9
    # A mask between two tokens that follow each other hides nothing.
    tokens = batch["tokens"]
    alone = (tokens[:, 1:-1] == MASK) & (tokens[:, 2:] == tokens[:, :-2] + 1)
    share = alone.sum() / n_masks
    assert 0.02 < share < math.exp(-3) + 4.4 * (0.05 / n_masks) ** 0.5


def test_infilling_draws_what_a_plain_loop_draws():
    """How many tokens a mask between two tokens that stay hides, against spans drawn and placed one by one: the law of
    Poisson but for the spans that the budget cuts short."""
    n, rows, budget = 127, 3000, 39
    tokens = BART().batch(masked_split(500_000), np.arange(rows), n + 1, seed=1)["tokens"]
    alone = (tokens[:, 1:-1] == MASK) & (tokens[:, 2:] >= 1000) & (tokens[:, :-2] >= 1000)
    ours = np.bincount((tokens[:, 2:] - tokens[:, :-2] - 1)[alone].clip(0, 9), minlength=10)

    draw, theirs = np.random.default_rng(0), np.zeros(10)
    for _ in range(rows):
        lengths = []
        while sum(lengths) < budget:
            lengths.append(min(draw.poisson(3.0), budget - sum(lengths)))
        behind = draw.integers(0, n - budget + 1, len(lengths)).tolist()
        for length, place in zip(lengths, behind, strict=True):
            theirs[min(length, 9)] += behind.count(place) == 1 and 0 < place < n - budget
    scale = (ours.sum() / theirs.sum()) ** 0.5
    assert 0.97 < scale < 1.03
    assert ((ours / scale - theirs * scale) ** 2 / (ours + theirs)).sum() < 33.7  # chi-square, 9 degrees: 1 in 10,000


def test_infilling_puts_masks_everywhere_alike():
    """How many of the 9 tokens that stay lie before a mask is uniform on 0 .. 9."""
    tokens = BART(0.1).batch(masked_split(500_000), np.arange(20_000), 11, seed=1)["tokens"]
    assert ((tokens >= 1000).sum(axis=1) == 9).all()
    before = np.cumsum(tokens >= 1000, axis=1)[tokens == MASK]
    counts = np.bincount(before, minlength=10)
    assert len(counts) == 10 and ((counts - len(before) / 10) ** 2 / (len(before) / 10)).sum() < 33.7  # 9 degrees, 1 in 10,000


def test_infilling_counts_exactly_where_floating_point_does_not():
    batch = BART(0.07, 2.0).batch(masked_split(10_000), np.arange(50), 101, seed=1)
    assert ((batch["tokens"] >= 1000).sum(axis=1) == 93).all()  # 0.07 * 100 = 7.000000000000001


def test_infilling_refuses_a_row_without_room():
    with pytest.raises(UserError, match="train.seq_len = 1 holds no token"):
        BART().rows_per_epoch(masked_split(10), 1)


# ---------------------------------------------------------------------------------------------------------------------
# UL2


MODELS = {
    "decoder": ("llama", dict(d_model=32, n_layers=1, n_heads=2, d_ff=48)),
    "encoder-decoder": ("t5", dict(d_model=32, n_layers=1, n_heads=2, d_head=16)),
}


def ul2_and_model(architecture: str, seq_len: int = 32):
    name, options = MODELS[architecture]
    model, objective = REGISTRY.get("model", name, "test")(**options).build(1536, seq_len), UL2()
    assert objective.adapt(model) is model
    initialise(model, 1)
    return objective, model


@pytest.mark.parametrize("seq_len", [6, 7, 16, 64, 200, 512])
@pytest.mark.parametrize("seed", [None, 7])
def test_each_mode_of_a_decoder_rebuilds_its_text(seq_len, seed):
    objective, _ = ul2_and_model("decoder")
    batch = objective.batch(unique_split(50_000), np.arange(120), seq_len, seed)
    for i in range(120):
        mode, row, v = batch["mode"][i], batch["tokens"][i], batch["visible"][i]
        scored = np.flatnonzero(batch["targets"][i] != IGNORE)
        n = len(scored)
        assert (scored == v - 1 + np.arange(n)).all()  # from the input's last token on, without a gap
        targets = batch["targets"][i][scored]
        assert (row[v : v + n - 1] == targets[:-1]).all() and (row[v + n - 1 :] == UniqueTokens.pad).all()
        assert row[0] == UniqueTokens.sentinels[mode] and row[v - 1] == targets[-1] == UniqueTokens.eot
        text = [*row[1 : v - 1], *targets[:-1]] if mode == 99 else rebuild(row[1:v], targets)
        assert text == [1000 + (text[0] - 1000 + j) % 50_000 for j in range(len(text))]
        used, spans = v + n - 1, (targets < 200).sum() - 1
        assert used == seq_len if mode == 99 else used > seq_len - 3 or spans == 97  # no room is left for another token


@pytest.mark.parametrize("seq_len", [512, 1024])
def test_short_spans_keep_their_law_in_rows_longer_than_the_sentinels_last(seq_len):
    batch = UL2().batch(unique_split(90_000), np.arange(70), seq_len, 1)
    targets = batch["targets"]
    spans = ((targets >= 100) & (targets < 200)).sum(axis=1)
    hidden = (targets >= 1000).sum(axis=1)
    assert spans.max() == 97 and ((targets < 197) | (targets >= 1000)).all()  # never a mode's token
    means = hidden[spans == 97] / 97
    assert set(means.round()) == ({3} if seq_len == 512 else {3, 8}) and abs(means - means.round()).max() < 0.05
    assert (batch["visible"].max() == seq_len) and targets.shape[1] <= seq_len


def test_a_decoder_scores_its_targets_where_no_input_shows_them():
    """The sums of the loss are those of full logits, one micro-batch of one row as well; and a token of the targets moves no
    score before it."""
    objective, model = ul2_and_model("decoder")
    split = unique_split(500)
    for row in range(6):
        arrays = objective.batch(split, np.array([row]), 32, None)
        batch = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
        parts = model(**batch, loss=objective.loss)
        with torch.no_grad():
            logits = model(batch["tokens"], visible=batch["visible"])
            expected = F.cross_entropy(logits[0], batch["targets"][0], ignore_index=IGNORE, reduction="sum")
            assert abs(parts["loss"].item() - expected.item()) < 1e-3
            at = int(batch["visible"][0])  # the first target, read again
            batch["tokens"][0, at] += 100
            moved = (model(batch["tokens"], visible=batch["visible"]) - logits).abs().amax(dim=-1)[0] > 1e-7
        assert not moved[:at].any() and moved[at]


@pytest.mark.parametrize("seq_len", [4, 5, 16, 64, 200])
@pytest.mark.parametrize("seed", [None, 7])
def test_each_mode_rebuilds_its_text(seq_len, seed):
    objective, split = UL2(), unique_split(50_000)
    batch = objective.batch(split, np.arange(120), seq_len, seed)
    sizes = {}
    for i in range(120):
        mode, row = batch["mode"][i], batch["tokens"][i][: batch["visible"][i]]
        assert row[0] == UniqueTokens.sentinels[mode]
        scored = batch["targets"][i] != IGNORE
        n = scored.sum()
        assert scored[:n].all()  # padding comes last
        targets = batch["targets"][i][:n]
        assert batch["decoder_tokens"][i][0] == UniqueTokens.pad
        assert (batch["decoder_tokens"][i][1:n] == targets[:-1]).all()
        assert (batch["decoder_tokens"][i][n:] == UniqueTokens.pad).all()
        assert row[-1] == targets[-1] == UniqueTokens.eot
        if mode == 99:
            text = [*row[1:-1].tolist(), *targets[:-1].tolist()]
            assert 1 <= n - 1 <= (seq_len - 1) // 2
        else:
            text = rebuild(row[1:], targets)
        assert text == [1000 + (text[0] - 1000 + j) % 50_000 for j in range(len(text))]
        sizes.setdefault(mode, []).append(len(text))
    assert set(sizes) == {97, 98, 99}
    assert set(sizes[99]) == {seq_len - 1}


def test_denoisers_are_equally_often_and_suffixes_a_quarter():
    objective, split = UL2(), unique_split(50_000)
    batch = objective.batch(split, np.arange(7000), 64, seed=3)
    for mode, share in ((97, 2 / 7), (98, 4 / 7), (99, 1 / 7)):
        assert abs((batch["mode"] == mode).mean() - share) < 4.4 * (share * (1 - share) / 7000) ** 0.5
    suffix = (batch["targets"] != IGNORE).sum(axis=1)[batch["mode"] == 99] - 1
    assert abs(suffix.mean() / 63 - 0.25) < 0.02


@pytest.mark.parametrize("objective", [BART(), UL2(), ul2_and_model("decoder")[0]], ids=["bart", "ul2", "ul2 decoder"])
def test_rows_depend_on_seed_and_number_alone_and_evaluation_scores_each_target_once(objective):
    split = masked_split(3_000)
    rows = np.array([7, 3, 400, 7])
    together = objective.batch(split, rows, 40, seed=5)
    for i, row in enumerate(rows):
        alone = objective.batch(split, np.array([row]), 40, seed=5)
        assert all((together[key][i] == alone[key][0]).all() for key in together)
    n = objective.rows_per_epoch(split, 40)
    evaluated = objective.batch(split, np.arange(n + 3), 40, None)
    assert (evaluated["targets"][n:] == IGNORE).all() and (evaluated["targets"][:n] != IGNORE).any(axis=1).all()
    seen = np.concatenate([objective.batch(split, np.arange(n), 40, 5)[key].ravel() for key in ("tokens", "targets")])
    assert set(range(1000, 4000)) <= set(seen.tolist())  # an epoch passes over no token


def test_ul2_needs_its_sentinels():
    split = unique_split(9_000)
    split.tokenizer.sentinels = np.arange(100, 150)
    with pytest.raises(UserError, match="UL2 needs 100 sentinels, but the vocabulary has 50"):
        UL2().batch(split, np.arange(2), 64, 1)


@pytest.mark.parametrize(("architecture", "least"), [("encoder-decoder", 4), ("decoder", 6)])
def test_ul2_refuses_a_row_without_room(architecture, least):
    objective, _ = ul2_and_model(architecture)
    with pytest.raises(UserError, match=f"train.seq_len = {least - 1} is too short .* take {least} or more"):
        objective.rows_per_epoch(unique_split(10), least - 1)


@pytest.mark.parametrize(
    ("name", "architecture"), [("bart", "encoder-decoder"), ("ul2", "encoder-decoder"), ("ul2", "decoder")]
)
def test_a_model_trains_on_it(name, architecture):
    objective, model = ul2_and_model(architecture)
    split = masked_split(500)
    if name == "bart":
        objective = BART()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for step in range(40):
        arrays = objective.batch(split, np.arange(16) + 16 * step, 32, seed=1)
        parts = model(**{key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}, loss=objective.loss)
        counts = objective.counts(arrays, split.tokenizer)
        assert set(parts) == set(counts)
        (parts["loss"] / counts["loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(objective.report({key: part.item() for key, part in parts.items()}, counts)["loss"])
    assert losses[0] > 6.5 and losses[-1] < losses[0] - 1
