"""Span corruption: the text is rebuilt from what the model sees, spans have their laws, nothing is lost or scored twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from nanopre import UserError
from nanopre.data import Split, row_keys
from nanopre.distributed import initialise
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.spans import composition, noise_counts, raw_length

REGISTRY = load_plugins()
SpanCorruption = REGISTRY.get("objective", "span_corruption", "test")


class UniqueTokens:
    """A vocabulary in which a text's tokens are 1000 + their number in it, so that every token tells where it comes from."""

    pad, eot = 0, 1
    sentinels = np.arange(100, 200)
    bytes_per_token = np.repeat([0, 2], [1000, 20_000])


def unique_split(n: int, document: int = 37) -> Split:
    """A text of n tokens in documents of so many, each with its end; of documents of 0 tokens one without."""
    tokens = np.arange(1000, 1000 + n, dtype=np.uint32)
    documents = np.array([0, n])
    if document:
        ends = np.append(np.arange(document, n, document), n)
        tokens = np.insert(tokens, ends, UniqueTokens.eot)
        documents = np.append(0, ends + np.arange(1, len(ends) + 1))
    return Split(tokens, documents, documents, n, UniqueTokens())


def rebuild(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """The text: each sentinel of the input replaced by what follows the same sentinel in the targets."""
    hidden: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if 100 <= token < 200:
            span = hidden[token] = []
        else:
            span.append(token)
    text = []
    for token in inputs[:-1].tolist():
        text += hidden.pop(token) if 100 <= token < 200 else [token]
    assert not hidden
    return text


def test_t5s_own_lengths():
    assert raw_length(512, 0.15, 3.0) == 568
    assert noise_counts(568, 0.15, 3.0) == (85, 28)
    batch = SpanCorruption().batch(unique_split(10_000), np.arange(3), 512, seed=0)
    assert batch["tokens"].shape == (3, 512) and batch["targets"].shape == (3, 114)


@given(
    seq_len=st.integers(2, 300),
    density=st.floats(0, 1),
    mean=st.floats(1, 20),
    n=st.integers(1, 3000),
    document=st.integers(1, 800),
    seed=st.one_of(st.none(), st.integers(0, 2**40)),
    first=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_the_text_is_rebuilt_exactly(seq_len, density, mean, n, document, seed, first):
    objective, split = SpanCorruption(density, mean), unique_split(n, document)
    length = raw_length(seq_len, density, mean)
    noise, spans = noise_counts(length, density, mean)
    first = first % objective.rows_per_epoch(split, seq_len) if seed is None else first
    if spans > 100:
        with pytest.raises(UserError, match=f"{spans} spans in {length} tokens, but the vocabulary has 100 sentinels"):
            objective.batch(split, np.array([first]), seq_len, seed)
        return
    batch = objective.batch(split, np.array([first, first]), seq_len, seed)
    assert batch["tokens"].shape[1] <= seq_len
    inputs, decoder = batch["tokens"][0], batch["decoder_tokens"][0]
    targets = np.append(decoder[1:], UniqueTokens.eot)  # the decoder's input is the targets, one place later
    assert decoder[0] == UniqueTokens.pad
    scored = batch["targets"][0] != IGNORE
    assert (batch["targets"][0][scored] == targets[scored]).all()
    assert scored.all() or seed is None
    assert inputs[-1] == targets[-1] == UniqueTokens.eot

    text = rebuild(inputs, targets)  # without the ends of documents, so that none is hidden
    assert text == [1000 + (text[0] - 1000 + i) % n for i in range(length)]  # `length` tokens that follow each other
    is_sentinel = (inputs >= 100) & (inputs < 200)
    assert inputs[is_sentinel].tolist() == list(range(100, 100 + spans))  # each once, in order
    assert len(targets) == noise + spans + 1
    assert inputs[0] >= 1000 and (spans == 0 or is_sentinel[-2])  # a row begins with text and ends with a span
    in_text, in_marks = batch["text_at"][0], batch["marks_at"][0]
    assert (targets[in_text] >= 1000).all() and (targets[in_marks] < 1000).all()
    assert sorted([*in_text, *in_marks]) == list(range(len(targets)))


def test_a_row_without_room_is_refused():
    with pytest.raises(UserError, match="train.seq_len = 1 holds no token beside the end of text; take 2 or more"):
        SpanCorruption().rows_per_epoch(unique_split(10), 1)


def test_lengths_are_exact_where_floating_point_is_not():
    assert noise_counts(300, 0.285, 3.0)[0] == 86  # of 85.5, half to even
    assert round(300 * 0.285) == 85  # of 85.49999999999999


@pytest.mark.parametrize("length", [1, 2, 3, 10, 30, 568, 1000])
def test_counts_stay_within_what_a_text_allows(length):
    for density in (0.0, 0.15, 0.5, 1.0):
        noise, spans = noise_counts(length, density, 3.0)
        if length == 1:
            assert (noise, spans) == (0, 0)
        else:
            assert 1 <= spans <= noise <= length - 1 and spans <= length - noise
            assert noise == min(max(round(length * density), 1), length - 1)


def test_compositions_are_uniform():
    """All C(6, 2) = 15 ways to cut 7 into 3 positive parts, equally often; and the first part's law for T5's lengths, which
    'every span is 3 long' would not pass: P(first = i) = C(85 - i - 1, 26) / C(84, 27)."""
    edges = composition(row_keys(1, np.arange(30_000), 0), 7, 3)
    parts, counts = np.unique(np.diff(edges, axis=1), axis=0, return_counts=True)
    assert len(parts) == 15 and (parts > 0).all() and (parts.sum(axis=1) == 7).all()
    assert ((counts - 2000) ** 2 / 2000).sum() < 42.6  # chi-square of 14 degrees of freedom: 1 in 10,000

    from math import comb

    first = composition(row_keys(2, np.arange(30_000), 0), 85, 28)[:, 1]
    for i in range(1, 6):
        p = comb(85 - i - 1, 26) / comb(84, 27)
        assert abs((first == i).mean() - p) < 4.4 * (p * (1 - p) / 30_000) ** 0.5


def test_noise_falls_everywhere_but_first_and_always_last():
    split = unique_split(568 * 400)
    batch = SpanCorruption().batch(split, np.arange(400), 512, seed=None)
    hidden = np.take_along_axis(batch["targets"], batch["text_at"], axis=1) - 1000
    share = np.bincount((hidden % 568).ravel(), minlength=568) / 400
    assert share.mean() == 85 / 568  # exactly: the rule is a count
    assert share[0] == 0 and share[-1] == 1  # T5's own law, known and kept
    assert abs(share[200:400].mean() - 0.15) < 0.02


def test_an_epoch_scores_each_row_once_and_loses_no_token():
    split, objective = unique_split(5_000), SpanCorruption()
    n = objective.rows_per_epoch(split, 64)
    for seed in (None, 3):
        batch = objective.batch(split, np.arange(n), 64, seed)
        seen = np.concatenate([batch["tokens"].ravel(), batch["decoder_tokens"].ravel()])
        assert set(seen[seen >= 1000]) == set(range(1000, 6_000))
    text = batch["targets"][batch["targets"] >= 1000]
    assert len(text) == n * noise_counts(raw_length(64, 0.15, 3.0), 0.15, 3.0)[0]
    evaluated = objective.batch(split, np.arange(n + 3), 64, None)["targets"]
    assert (evaluated[n:] == IGNORE).all()
    scored = evaluated[evaluated >= 1000]
    assert len(scored) == len(set(scored))  # the last row does not score the split's start again


def test_a_sentinel_is_scored_where_its_span_is():
    """Wherever the text ends in the last row: not the sentinel of a span that begins behind the end."""
    partly = 0
    for n in range(1, raw_length(64, 0.15, 3.0)):
        targets = SpanCorruption().batch(unique_split(n), np.array([0]), 64, None)
        decoder, scored = targets["decoder_tokens"][0], targets["targets"][0] != IGNORE
        at = np.flatnonzero((decoder[1:] >= 100) & (decoder[1:] < 200))
        assert (scored[at] == scored[at + 1]).all(), n
        partly += 0 < scored[at].sum() < len(at)
    assert partly > 30


def test_rows_depend_on_seed_and_number_alone():
    split, objective = unique_split(9_000), SpanCorruption()
    rows = np.array([7, 3, 400, 7])
    together = objective.batch(split, rows, 64, seed=5)
    for i, row in enumerate(rows):
        alone = objective.batch(split, np.array([row]), 64, seed=5)
        assert all((together[key][i] == alone[key][0]).all() for key in together)
    n = objective.rows_per_epoch(split, 64)
    epochs = [objective.batch(split, np.arange(n) + e * n, 64, seed=5)["targets"] for e in (0, 1)]
    assert not (epochs[0] == epochs[1]).all(axis=1).any()
    assert (objective.batch(split, rows, 64, None)["tokens"] == objective.batch(split, rows, 64, None)["tokens"]).all()


def test_the_loss_is_that_of_full_logits_and_text_is_told_apart():
    split, objective = unique_split(2_000), SpanCorruption()
    model = REGISTRY.get("model", "t5", "test")(d_model=32, n_layers=1, n_heads=2, d_head=16).build(3000, 64)
    initialise(model, 1)
    arrays = objective.batch(split, np.arange(4), 64, seed=None)
    arrays["targets"][0, :5] = IGNORE
    batch = {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
    parts, counts = model(**batch, loss=objective.loss), objective.counts(arrays, None)
    logits = model(batch["tokens"], decoder_tokens=batch["decoder_tokens"])
    each = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none", ignore_index=IGNORE)
    is_text = batch["targets"].flatten() >= 1000
    assert counts == {"loss": int((batch["targets"] != IGNORE).sum()), "text": int(is_text.sum())}
    torch.testing.assert_close(parts["loss"], each.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts["text"], each[is_text].sum(), rtol=1e-5, atol=1e-4)
    assert parts["loss"].requires_grad and not parts["text"].requires_grad
    report = objective.report({key: part.item() for key, part in parts.items()}, counts)
    assert abs(report["text_loss"] - each[is_text].mean().item()) < 1e-5
