"""Masked tokens and sentence pairs, on a corpus in which every token's id is its position: so where a token comes from,
what follows what and what was left out are exact statements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from nanopre import UserError, masking
from nanopre.config import build_plugin
from nanopre.data import Split, random32, row_keys
from nanopre.distributed import initialise
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bpe_tokenizer, bytes_tokenizer

REGISTRY = load_plugins()


@dataclass(eq=False)
class UniqueIds:
    """A tokenizer of which only the ids matter: 0 .. n-1 are ordinary."""

    n: int

    def __post_init__(self):
        self.eot, self.pad, self.cls, self.sep, self.mask = range(self.n, self.n + 5)
        self.n_vocab = self.n + 5
        self.bytes_per_token = np.r_[np.ones(self.n, dtype=int), np.zeros(5, dtype=int)]


def unique_split(documents: list[list[int]]) -> Split:
    """Documents of sentences of so many tokens; id = position in the split, and <|endoftext|> after each document."""
    sizes = [sum(sentences) + 1 for sentences in documents]
    starts = np.cumsum([0, *sizes])
    sentences = {int(start + sum(d[:i])) for start, d in zip(starts, documents, strict=False) for i in range(len(d))}
    tokens = np.arange(starts[-1])
    tokens[starts[1:] - 1] = starts[-1]
    return Split(tokens.astype(np.uint32), starts, np.array([*sorted(sentences), starts[-1]]), 0, UniqueIds(int(starts[-1])))


def random_split(n_documents: int, seed: int = 0, longest: int = 40) -> Split:
    draw = np.random.default_rng(seed)
    return unique_split([draw.integers(1, 20, draw.integers(1, longest)).tolist() for _ in range(n_documents)])


def objective(**options):
    return build_plugin(REGISTRY, "objective", {"name": "mlm_nsp", **options}, "objective")


def unmasked(batch) -> np.ndarray:
    """The tokens as they were."""
    tokens = batch["tokens"].copy()
    for row, positions, targets in zip(tokens, batch["positions"], batch["targets"], strict=True):
        row[positions[targets != IGNORE]] = targets[targets != IGNORE]
    return tokens


def parts(batch, tokenizer) -> list[tuple[list, list | None]]:
    """(A, B) of each row as it was; B None where there is no pair. Proves the form [CLS] A [SEP] B [SEP], pad."""
    result = []
    for tokens, visible, segments, label in zip(
        unmasked(batch), batch["visible"], batch["segments"], batch["is_random"], strict=True
    ):
        row = tokens[:visible].tolist()
        assert (tokens[visible:] == tokenizer.pad).all()
        assert row[0] == tokenizer.cls
        assert row[-1] == tokenizer.sep
        ends = [i for i, token in enumerate(row) if token == tokenizer.sep]
        assert len(ends) == (1 if label == IGNORE else 2)
        inner = row[1 : ends[0]], row[ends[0] + 1 : -1]
        assert all(token < tokenizer.eot for part in inner for token in part)
        expected = np.zeros(len(tokens), dtype=int)
        expected[ends[0] + 1 : visible] = 1
        assert segments.tolist() == expected.tolist()
        result.append((inner[0], None if label == IGNORE else inner[1]))
    return result


def is_run(part: list[int]) -> bool:
    return part == list(range(part[0], part[0] + len(part)))


documents_strategy = st.lists(st.lists(st.integers(1, 30), min_size=0, max_size=6), min_size=2, max_size=8).filter(
    lambda documents: sum(map(bool, documents)) >= 2 and max(map(len, documents)) >= 2
)


@settings(max_examples=150, deadline=None)
@given(
    documents=documents_strategy,
    seq_len=st.integers(5, 48),
    seed=st.one_of(st.none(), st.integers(0, 2**40)),
    fraction=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    whole_word=st.booleans(),
)
def test_every_row_is_what_it_says(documents, seq_len, seed, fraction, whole_word):
    # Empty documents, documents of one sentence, sentences longer than the window; every row of two epochs.
    split = unique_split(documents)
    split.tokenizer.token_bytes = lambda ids: b" x" if ids[0] % 3 else b"x"
    o = objective(mask_fraction=fraction, whole_word=whole_word)
    n = o.rows_per_epoch(split, seq_len)
    batch = o.batch(split, np.arange(2 * n), seq_len, seed)
    k = max(1, round(fraction * seq_len))
    assert batch["positions"].shape == batch["targets"].shape == (2 * n, k)
    starts = set(split.sentences.tolist())
    sizes = np.diff(split.documents) - 1
    pairs = parts(batch, split.tokenizer)
    if seed is None:
        assert (batch["targets"][n:] == IGNORE).all()
        assert (batch["is_random"][n:] == IGNORE).all()
        assert all(pair == ([], None) for pair in pairs[n:])
        pairs = pairs[:n]
    for (a, b), label, targets, visible in zip(pairs, batch["is_random"], batch["targets"], batch["visible"], strict=False):
        assert is_run(a)
        document = np.searchsorted(split.documents, a[0], side="right") - 1
        assert a[-1] < split.documents[document + 1] - 1
        counted = (targets != IGNORE).sum()
        candidates = len(a) + len(b or [])
        target = min(max(1, round(fraction * visible)), candidates)
        assert 1 <= counted <= k if whole_word else counted == target
        if b is None:
            # Nothing to cut at: no sentence begins inside.
            assert not starts & set(range(a[0] + 1, a[-1] + 1))
            continue
        other = np.searchsorted(split.documents, b[0], side="right") - 1
        assert is_run(b)
        assert b[0] in starts
        assert b[-1] < split.documents[other + 1] - 1
        assert len(b) <= max(np.delete(sizes, document))
        if label == 0:
            assert b[0] == a[-1] + 1
        else:
            assert other != document


@settings(max_examples=80, deadline=None)
@given(documents=documents_strategy, seq_len=st.integers(5, 40), seed=st.one_of(st.none(), st.integers(0, 2**40)))
def test_nothing_is_lost_at_the_edges(documents, seq_len, seed):
    # With a long document more, no B is ever cut short for the sake of equal lengths.
    split = unique_split([*documents, [60], [60]])
    o = objective(short_fraction=0.0)
    n = o.rows_per_epoch(split, seq_len)
    for epoch in [0] if seed is None else [0, 3]:
        rows = np.arange(epoch * n, (epoch + 1) * n)
        batch = o.batch(split, rows, seq_len, seed)
        # A random B hides what would have stood there, which is as long: A tells where that was.
        seen = np.zeros(split.n_tokens, dtype=int)
        for a, b in parts(batch, split.tokenizer):
            seen[a[0] : a[0] + len(a) + len(b or [])] += 1
        is_text = split.tokens < split.tokenizer.eot
        assert (seen == is_text).all()  # every token in exactly one window


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 300), seq_len=st.integers(3, 40), seed=st.one_of(st.none(), st.integers(0, 2**40)))
def test_full_sentences_hold_every_token(n, seq_len, seed):
    split = unique_split([[n]])
    o = objective(nsp=False)
    rows = o.rows_per_epoch(split, seq_len)
    batch = o.batch(split, np.arange(rows + 2), seq_len, seed)
    assert set(batch) == {"tokens", "visible", "positions", "targets"}
    seen = np.zeros(split.n_tokens, dtype=int)
    for i, (row, visible) in enumerate(zip(unmasked(batch), batch["visible"], strict=True)):
        assert row[0] == split.tokenizer.cls
        assert row[visible - 1] == split.tokenizer.sep
        assert (row[visible:] == split.tokenizer.pad).all()
        text = np.where(row[1 : visible - 1] == split.tokenizer.eot, n, row[1 : visible - 1])
        if i < rows:
            seen[text] += 1
            assert (np.diff(text) % split.n_tokens == 1 % split.n_tokens).all()
        elif seed is None:
            assert not len(text)
            assert (batch["targets"][i] == IGNORE).all()
    if seed is None:
        assert (seen == 1).all()
    else:
        assert seen.min() >= 1
    assert not (batch["targets"] == split.tokenizer.eot).any()


def test_a_row_depends_on_the_seed_and_its_number_alone():
    split, o = random_split(30), objective()
    n = o.rows_per_epoch(split, 64)
    rows = np.array([5, 0, 2 * n + 1, 5, n + 5])
    for seed in (7, None):
        together = objective().batch(split, rows, 64, seed)
        for i, row in enumerate(rows):
            alone = o.batch(split, np.array([row]), 64, seed)
            assert all((alone[key][0] == together[key][i]).all() for key in together)
    one, other = o.batch(split, np.arange(50), 64, 1), o.batch(split, np.arange(50), 64, 2)
    assert (one["tokens"] != other["tokens"]).any(axis=1).all()


def test_a_new_epoch_masks_and_pairs_anew():
    split, o = random_split(30), objective(short_fraction=0.0)
    n = o.rows_per_epoch(split, 64)

    def epoch(i):
        batch = o.batch(split, np.arange(i * n, (i + 1) * n), 64, 1)
        rows = zip(parts(batch, split.tokenizer), batch["positions"], batch["targets"], batch["is_random"], strict=True)
        return {a[0]: (set(p[t != IGNORE].tolist()), label) for (a, _), p, t, label in rows}, batch

    (first, batch), (second, later) = epoch(0), epoch(1)
    assert first.keys() == second.keys()  # the same windows,
    assert (batch["tokens"][:, 1] != later["tokens"][:, 1]).mean() > 0.9  # in another order,
    same = [first[w][0] == second[w][0] for w in first]
    assert np.mean(same) < 0.05  # masked elsewhere,
    labels = [(first[w][1], second[w][1]) for w in first if first[w][1] != IGNORE]
    assert 0.4 < np.mean([a == b for a, b in labels]) < 0.6  # with new coins


@pytest.fixture(scope="module")
def many():
    """200,000 tokens and more of rows, with every token's id its own."""
    split = random_split(400)
    o = objective()
    return split, o.batch(split, np.arange(4000), 64, 3)


def within(observed: float, expected: float, n: int) -> bool:
    """Whether a rate of n draws lies within four standard errors."""
    return abs(observed - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


def test_of_the_targets_80_10_10_percent_are_masked_replaced_and_kept(many):
    split, batch = many
    assert batch["visible"].sum() > 100_000
    is_target = batch["targets"] != IGNORE
    found = np.take_along_axis(batch["tokens"], batch["positions"], axis=1)[is_target]
    targets = batch["targets"][is_target]
    n = len(targets)
    drawn = (found != split.tokenizer.mask) & (found != targets)  # a random token is the same one 1 time in 80,000
    assert within((found == split.tokenizer.mask).mean(), 0.8, n)
    assert within(drawn.mean(), 0.1, n)
    assert within((found == targets).mean(), 0.1, n)
    assert found[drawn].max() < split.tokenizer.n
    # Chi-square of the random ids in 50 bins: 49 degrees of freedom, standard deviation sqrt(98).
    counts = np.histogram(found[drawn], bins=50, range=(0, split.tokenizer.n))[0]
    expected = counts.sum() / 50
    assert abs(((counts - expected) ** 2 / expected).sum() - 49) < 4.5 * 98**0.5


def test_every_place_in_a_row_is_as_likely_to_be_masked(many):
    _, batch = many
    full = (batch["visible"] == 64) & (batch["is_random"] == IGNORE)
    both = (batch["visible"] == 64) & (batch["is_random"] != IGNORE)
    assert not full.any() or both.sum() > 1000
    chosen = np.zeros_like(batch["tokens"])
    np.put_along_axis(chosen, batch["positions"], (batch["targets"] != IGNORE).astype(int), axis=1)
    rates = chosen[both][:, 1:-1].mean(axis=0)
    # Ten targets of 61 candidates; a column is the second [SEP]'s in some rows, so the rate is a little below.
    share = 10 / 61 * (1 - (batch["segments"][both][:, 1:-1][:, :-1] < batch["segments"][both][:, 2:-1]).mean(axis=0))
    n = both.sum()
    assert (np.abs(rates[:-1] - share) < 4.5 * (share * (1 - share) / n) ** 0.5).all()


def test_the_coin_is_fair_and_lengths_tell_nothing(many):
    split, batch = many
    labels = batch["is_random"]
    pairs = labels != IGNORE
    assert pairs.sum() > 1000
    assert within(labels[pairs].mean(), 0.5, pairs.sum())
    lengths = batch["segments"].sum(axis=1)
    true, random = (np.bincount(lengths[labels == label], minlength=65) / (labels == label).sum() for label in (0, 1))
    # Kolmogorov and Smirnov's distance of two samples: above 1.95 sqrt(2 / n) once in a thousand.
    assert np.abs(np.cumsum(true) - np.cumsum(random)).max() < 1.95 * (4 / pairs.sum()) ** 0.5
    # A random B is as likely to be any sentence that has enough text after it: spread over most documents.
    where = [np.searchsorted(split.documents, b[0]) for (_, b), label in zip(parts(batch, split.tokenizer), labels, strict=True)
             if label == 1]  # fmt: skip
    assert len(set(where)) > 300


def test_short_documents_leak_no_label_by_length():
    # A long document among short ones: its true continuations would be longer than any random one can be.
    split = unique_split([[5, 5, 5, 5] * 50, *[[3, 4, 5]] * 20])
    batch = objective(short_fraction=0.0).batch(split, np.arange(4000), 64, 1)
    lengths, labels = batch["segments"].sum(axis=1), batch["is_random"]
    for label in (0, 1):
        assert lengths[labels == label].max() == 12 + 1  # the longest other document, and its [SEP]
    true, random = (np.bincount(lengths[labels == label], minlength=20) / (labels == label).sum() for label in (0, 1))
    assert np.abs(np.cumsum(true) - np.cumsum(random)).max() < 1.95 * (4 / (labels != IGNORE).sum()) ** 0.5


def test_one_row_in_ten_is_short_in_training_and_none_in_evaluation():
    split = unique_split([[2] * 5000, [2] * 5000])
    rows = np.arange(4000)
    lengths = objective().batch(split, rows, 64, 1)["visible"]
    short = lengths < 63
    assert within(short.mean(), 0.1 * 58 / 60, len(rows))  # of 2 .. 61 tokens, of which 61 and 60 aren't seen here
    inner = lengths[short]
    assert inner.min() >= 4
    # Uniform on 2 .. 59 tokens, with two or three special ones: the mean is 30.5 + 3, its error 16.7 / sqrt(n).
    assert abs(inner.mean() - 33.5) < 4 * 16.7 / len(inner) ** 0.5 + 0.1
    n = objective().rows_per_epoch(split, 64)
    evaluated = objective().batch(split, np.arange(n), 64, None)["visible"]
    assert (evaluated == 64).sum() == n - 2  # all but the last window of each document


@pytest.mark.parametrize("documents", [[[9, 9, 9]], [[9, 9], [], []]])
def test_one_document_gives_no_pairs(documents):
    split = unique_split(documents)
    for ask in (lambda o: o.rows_per_epoch(split, 16), lambda o: o.batch(split, np.arange(2), 16, 1)):
        with pytest.raises(UserError, match=r"two documents or more.*objective\.nsp = false"):
            ask(objective())
    assert objective(nsp=False).batch(split, np.arange(2), 16, 1)["tokens"].shape == (2, 16)


def test_documents_of_one_sentence_give_no_pairs():
    split = unique_split([[9], [], [12], [5]])
    with pytest.raises(UserError, match=r"two sentences or more.*no document has a second.*objective\.nsp = false"):
        objective().rows_per_epoch(split, 16)
    assert objective(nsp=False).batch(split, np.arange(2), 16, 1)["tokens"].shape == (2, 16)
    assert objective().rows_per_epoch(unique_split([[9], [], [12], [5, 1]]), 16) == 3


@pytest.mark.parametrize(("nsp", "least"), [(True, 5), (False, 3)])
def test_a_row_has_room_for_its_special_tokens(nsp, least):
    split, o = unique_split([[9], [8, 1]]), objective(nsp=nsp)
    assert o.batch(split, np.arange(2), least, 1)["tokens"].shape == (2, least)
    with pytest.raises(UserError, match=f"take {least} or more"):
        o.batch(split, np.arange(2), least - 1, 1)


def test_impossible_settings_are_refused():
    for options in ({"mask_fraction": 1.5}, {"short_fraction": -0.1}):
        with pytest.raises(UserError, match="must be between 0 and 1"):
            objective(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Whole words


def test_words_begin_and_end_where_letters_and_digits_do():
    tokenizer = bytes_tokenizer()
    opens, closes = masking.word_edges(tokenizer)
    for character in " \n.,'-":
        assert opens[ord(character)]
        assert closes[ord(character)]
    for byte in b"aZ09" + "é".encode():
        assert not opens[byte]
        assert not closes[byte]
    assert not opens[tokenizer.eot :].any()
    bpe = bpe_tokenizer(["the cat. the dog, the cat. caf\u00e9s"] * 50, 385)
    opens, closes = masking.word_edges(bpe)
    words = {bytes(bpe.token_bytes([i])): i for i in range(bpe.eot)}
    assert opens[words[b" the"]]
    assert not closes[words[b" the"]]
    assert not opens[words[b"the"]]


def greedy(words: list[list[int]], n: int, k: int) -> list[int]:
    """What choose_words is to do, word by word, as BERT's code does it."""
    chosen = []
    for word in words:
        if len(chosen) + len(word) <= n:
            chosen += word
    return sorted(chosen or words[0][:k])


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), T=st.integers(2, 24), density=st.sampled_from([0.1, 0.4, 0.9]))
def test_whole_words_are_chosen_as_one_by_one(seed, T, density):
    draw = np.random.default_rng(seed)
    R, k = 4, max(1, T // 3)
    maskable, starts = draw.random((R, T)) < 0.8, draw.random((R, T)) < density
    random = draw.integers(0, 2**32, (R, T), dtype=np.uint32)
    n = np.minimum(draw.integers(1, k + 1, R), maskable.sum(axis=1))
    positions, counts = masking.choose_words(random, maskable, starts, n, k)
    for i in range(R):
        words = []
        for j in np.flatnonzero(maskable[i]):
            if starts[i, j] or not j or not maskable[i, j - 1]:
                words.append([])
            words[-1].append(int(j))
        words.sort(key=lambda word: (random[i, word[0]], word[0]))
        expected = greedy(words, n[i], k) if words else []
        assert sorted(positions[i, : counts[i]].tolist()) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Choosing, and the loss


@settings(max_examples=100, deadline=None)
@given(R=st.integers(1, 5), T=st.integers(1, 300), seed=st.integers(0, 2**40), density=st.floats(0, 1))
def test_positions_are_different_and_maskable(R, T, seed, density):
    maskable = np.random.default_rng(seed).random((R, T)) < density
    positions = masking.choose_positions(random32(row_keys(seed, np.arange(R), 0), T), maskable, T)
    for row, candidates in zip(positions, maskable, strict=True):
        assert sorted(row[: candidates.sum()].tolist()) == np.flatnonzero(candidates).tolist()


@pytest.fixture(scope="module")
def model():
    o = objective()
    bert = build_plugin(REGISTRY, "model", {"name": "bert", "d_model": 16, "n_layers": 1, "n_heads": 2}, "model")
    model = o.adapt(bert.build(vocab_size=370, seq_len=32))
    initialise(model, 1)
    return model


def text_split() -> Split:
    tokenizer, draw = bytes_tokenizer(), np.random.default_rng(0)
    tokens = draw.integers(0, 256, 900).astype(np.uint16)
    documents = np.array([0, 200, 210, 500, 900])
    tokens[documents[1:] - 1] = tokenizer.eot
    return Split(tokens, documents, np.union1d(documents, draw.integers(0, 900, 50)), 900, tokenizer)


@pytest.mark.parametrize("nsp", [True, False])
@pytest.mark.parametrize("seed", [3, None])
def test_the_loss_is_the_mean_over_targets_plus_the_mean_over_pairs(model, nsp, seed):
    o, split = objective(nsp=nsp), text_split()
    n = o.rows_per_epoch(split, 32)
    arrays = o.batch(split, np.arange(n - 4, n + 4), 32, seed)  # with seed None four rows are beyond the end
    batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
    sums, counts = model(**batch, loss=o.loss), o.counts(arrays, split.tokenizer)
    metrics = o.report({key: value.item() for key, value in sums.items()}, counts)

    hidden = {}
    inputs = {key: batch[key] for key in ("tokens", "visible", "segments") if key in batch}
    logits = model(**inputs).float()
    model(**inputs, loss=lambda head, h, _: hidden.update(h=h) or {})
    targets = torch.full_like(batch["tokens"], IGNORE)
    for i in range(len(targets)):
        keep = batch["targets"][i] != IGNORE
        targets[i, batch["positions"][i, keep]] = batch["targets"][i, keep]
    mlm = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORE)
    right = (logits.argmax(dim=-1) == targets)[targets != IGNORE].float().mean()
    assert counts["mlm"] == (targets != IGNORE).sum()
    torch.testing.assert_close(torch.tensor([metrics["mlm_loss"], metrics["mlm_accuracy"]]), torch.stack((mlm, right)).detach())
    nsp_loss = 0.0
    if nsp:
        head, labels = model.head, batch["is_random"]
        logits = head.outputs["nsp"](torch.tanh(head.pooler(hidden["h"][:, 0])))[labels != IGNORE]
        labels = labels[labels != IGNORE]
        assert counts["nsp"] == len(labels) > 0
        nsp_loss = F.cross_entropy(logits, labels).item()
        assert metrics["nsp_loss"] == pytest.approx(nsp_loss, rel=1e-5)
        assert metrics["nsp_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert metrics["loss"] == pytest.approx(mlm.item() + nsp_loss, rel=1e-5)
    assert set(metrics) == {"loss", "mlm_loss", "mlm_accuracy"} | ({"nsp_loss", "nsp_accuracy"} if nsp else set())
    assert sums.keys() == counts.keys()


def test_without_a_second_sentence_nothing_is_reported_of_pairs(model):
    o, split = objective(), text_split()
    split.sentences = np.union1d(split.documents, [899])
    arrays = o.batch(split, np.arange(8), 32, None)  # none of which has the last sentence
    sums = model(**{key: torch.from_numpy(array) for key, array in arrays.items()}, loss=o.loss)
    counts = o.counts(arrays, split.tokenizer)
    assert counts["nsp"] == 0
    assert set(o.report({key: value.item() for key, value in sums.items()}, counts)) == {"loss", "mlm_loss", "mlm_accuracy"}


def test_rows_without_targets_have_no_loss_and_no_gradient(model):
    o, split = objective(), text_split()
    n = o.rows_per_epoch(split, 32)
    arrays = o.batch(split, np.arange(n, n + 3), 32, None)
    assert set(o.counts(arrays, split.tokenizer).values()) == {0}
    sums = model(**{key: torch.from_numpy(array) for key, array in arrays.items()}, loss=o.loss)
    assert all(value == 0 for value in sums.values())
    model.zero_grad()
    sum(sums.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
