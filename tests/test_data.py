"""Rows as a function of (seed, row): permutations are permutations, epochs see every token, no order of asking matters."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanopre.data import Split, hash64, permute, prefetch, window_starts
from nanopre.tokenizer import bytes_tokenizer


def split_of(tokens) -> Split:
    tokens = np.asarray(tokens, dtype=np.uint16)
    return Split(tokens, np.array([0, len(tokens)]), np.array([0, len(tokens)]), len(tokens), bytes_tokenizer())


def test_the_hash_never_changes():
    # A change here would change the data order of every run that resumes.
    assert hash64(0).item() == 14365322253270923533
    expected = [6130716395826101715, 12498638095040825118, 15814290524953230989]
    assert hash64(1337, 2, np.arange(3)).tolist() == expected


def test_the_hash_spreads_its_bits():
    bits = np.unpackbits(hash64(7, np.arange(20_000)).view(np.uint8).reshape(-1, 8), axis=1)
    # A fair coin's mean of 20,000 lies within 0.5 +- 0.018 but for 4e-7 of the time, and 64 bits are asked.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.018
    flipped = hash64(7, np.arange(20_000)) ^ hash64(7, np.arange(20_000) ^ 1)
    assert abs(np.unpackbits(flipped.view(np.uint8)).mean() - 0.5) < 0.005


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@given(n=st.integers(1, 2**48), key=st.integers(0, 2**63), data=st.data())
def test_permute_stays_in_range_and_asks_nothing_of_its_neighbours(n, key, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8)))
    together = permute(index, n, key)
    assert ((together >= 0) & (together < n)).all()
    assert together.tolist() == [permute(np.array([i]), n, key)[0] for i in index]
    assert len(set(together.tolist())) == len(set(index.tolist()))


def test_permutations_of_different_keys_differ_and_look_uniform():
    where = np.array([permute(np.arange(10), 10, key) for key in range(4000)])
    counts = np.stack([np.bincount(column, minlength=10) for column in where.T])
    # Each of the 100 counts is binomial(4000, 0.1), with a standard deviation of 19: five of them.
    assert np.abs(counts - 400).max() < 95


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 200), length=st.integers(1, 64), start=st.integers(0, 199))
def test_gather_reads_on_from_the_start_at_the_end(n, length, start):
    split = split_of(np.arange(n))
    starts = np.array([start % n, 0])
    expected = [[(s + i) % n for i in range(length)] for s in starts]
    assert split.gather(starts, length).tolist() == expected


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    length=st.integers(1, 64),
    starts=st.lists(st.integers(0, 10_000), min_size=1, max_size=6),
)
def test_text_is_what_lies_between_the_ends_of_documents(sizes, length, starts):
    documents = np.cumsum([0, *(size + 1 for size in sizes)])
    tokens = np.arange(documents[-1], dtype=np.uint16)
    split = Split(tokens, documents, documents, 0, bytes_tokenizer())
    text = np.delete(tokens, documents[1:] - 1).tolist()
    assert split.text.n_tokens == len(text)
    starts = np.array(starts) % len(text)
    expected = [[text[(s + i) % len(text)] for i in range(length)] for s in starts]
    assert split.text.windows(starts, length).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(n_tokens=st.integers(1, 500), length=st.integers(1, 40), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_an_epoch_sees_every_token(n_tokens, length, seed, epoch):
    split = split_of(np.arange(n_tokens))
    n = -(-n_tokens // length)
    rows = np.arange(epoch * n, (epoch + 1) * n)
    starts = window_starts(split, rows, length, seed)
    seen = np.bincount(split.gather(starts, length).ravel(), minlength=n_tokens)
    assert seen.min() >= 1
    assert seen.sum() == n * length  # so fewer than `length` tokens are seen more than once
    # Any one row can be asked for alone.
    assert starts.tolist() == [window_starts(split, np.array([r]), length, seed)[0] for r in rows]


def test_epochs_and_seeds_have_orders_and_edges_of_their_own():
    split = split_of(np.zeros(10_000))
    starts = [window_starts(split, np.arange(e * 100, (e + 1) * 100), 100, seed) for seed in (1, 2) for e in (0, 1)]
    edges = {s.min() % 100 for s in starts}
    assert len(edges) > 1
    assert len({tuple(s) for s in starts}) == 4


def test_prefetch_makes_the_next_ones_while_the_consumer_works():
    made = []
    batches = prefetch(lambda step: made.append(step) or step * step, start=3)
    assert next(batches) == 9
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made[:3] == [3, 4, 5]
    assert [next(batches) for _ in range(3)] == [16, 25, 36]
    batches.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_an_error_in_the_thread_is_the_consumers():
    def make(step):
        if step == 2:
            raise ValueError("row 2")
        return step

    batches = prefetch(make, 0)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(ValueError, match="row 2"):
        next(batches)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
