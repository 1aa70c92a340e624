"""Spans of noise: how long, where, and what stands in their place. Pure functions, vectorised over the rows of a batch."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np

from nanopre import UserError
from nanopre.data import random32
from nanopre.tokenizer import Tokenizer


@cache
def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(noise tokens, spans) of `length` raw tokens, in exact arithmetic: T5's own code, in floating point, rounds some
    lengths one way or the other. One token and more is noise and one and more is not, as far as `length` allows."""
    noise = min(max(round(length * Fraction(str(density))), 1), length - 1)
    if noise < 1:
        return 0, 0
    spans = max(1, round(noise / Fraction(str(mean_span))))
    return noise, min(spans, noise, length - noise)


@cache
def raw_length(seq_len: int, density: float, mean_span: float, most_spans: int | None = None) -> int:
    """The most raw tokens whose input, with a sentinel for each span and the end of text, fits seq_len: 568 for 512
    (Raffel et al., 2020, section 3.1.4). A density near 1 would allow any number; at most 4 seq_len. With `most_spans`, as
    many tokens as have no more spans than that. Raises UserError for seq_len < 2."""

    def fits(length: int) -> bool:
        noise, spans = noise_counts(length, density, mean_span)
        return length - noise + spans + 1 <= seq_len and (most_spans is None or spans <= most_spans)

    if seq_len < 2:
        raise UserError(f"train.seq_len = {seq_len} holds no token beside the end of text; take 2 or more.")
    return max(length for length in range(1, 4 * seq_len + 1) if fits(length))


def composition(keys: np.ndarray, total: int, parts: int) -> np.ndarray:
    """(len(keys), parts + 1) int64: 0, parts - 1 different cut points in ascending order, and `total`. All ways to cut
    `total` into `parts` positive lengths are equally likely."""
    edges = np.zeros((len(keys), parts + 1), dtype=np.int64)
    edges[:, -1] = total
    if parts > 1:
        # The low bits are the position, so that no two draws are equal, and the parts - 1 least draws tell where they were.
        low = np.uint32((1 << (total - 1).bit_length()) - 1)
        draws = random32(keys, total - 1) & ~low | np.arange(1, total, dtype=np.uint32)
        draws.partition(parts - 2, axis=1)
        edges[:, 1:-1] = np.sort(draws[:, : parts - 1] & low, axis=1)
    return edges


def lay_out(
    text: np.ndarray, lengths: np.ndarray, offsets: np.ndarray, marks_at: np.ndarray, marks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens (R, W), source (R * W,)), int64. A row is a sequence of runs, W = the sum of its `lengths` (R, k); place i, in
    run j, holds text[i + offsets[:, j]], from `text` (R, n), and its source is where that is, all rows being one. The places
    marks_at (R, m) hold `marks` (m,) instead."""
    (R, n), W, row = text.shape, int(lengths[0].sum()), np.arange(len(text))[:, None]
    # np.repeat, take and assignment by flat indices are several times faster than those along an axis.
    source = np.repeat((offsets + row * (n - W)).ravel(), lengths.ravel())
    source += np.arange(R * W)
    tokens = text.reshape(-1).take(source, mode="clip").astype(np.int64)  # where a mark will be, a run may reach too far
    tokens[marks_at + row * W] = marks
    return tokens.reshape(R, W), source


class Corrupted(NamedTuple):
    """What `corrupt` makes of R rows of n tokens."""

    inputs: np.ndarray  # (R, n - noise + spans + 1): the text with a sentinel for each span, and the end of text
    targets: np.ndarray  # (R, noise + spans + 1): each sentinel with what it hid, and the end of text
    source: np.ndarray  # of each target, where in its row it comes from: of a sentinel its span's start, of the end 0
    text_at: np.ndarray  # (R, noise): which targets are text
    marks_at: np.ndarray  # (R, spans + 1): which are not


def corrupt(text: np.ndarray, keys: tuple[np.ndarray, np.ndarray], noise: int, spans: int, tokenizer: Tokenizer) -> Corrupted:
    """T5's span corruption (Raffel et al., 2020, section 3.1.4) of each row of `text` (R, n), from two keys a row. The
    lengths of the spans and of what lies between them are each drawn uniformly among all that are possible; a row begins
    with text and ends with a span."""
    R, n = text.shape
    kept, hidden = composition(keys[0], n - noise, spans), composition(keys[1], noise, spans)  # (R, spans + 1) each
    row, order = np.arange(R)[:, None], np.arange(spans + 1)
    marks = np.append(tokenizer.sentinels[:spans], tokenizer.eot)

    # In the input a mark ends each run of text; all that was hidden before the run is what its places lag behind by.
    kept_until = np.concatenate((kept[:, 1:], kept[:, -1:]), axis=1)  # each run's end; the end of text comes as one more
    inputs_at = kept_until + order
    inputs, _ = lay_out(text, np.diff(inputs_at, prepend=-1), hidden - order, inputs_at, marks)
    # In the targets a mark begins each run, and what was kept before counts; the last run is the end of text alone.
    marks_at = hidden + order
    lengths = np.diff(marks_at, append=noise + spans + 1)
    targets, source = lay_out(text, lengths, kept_until - order - 1, marks_at, marks)

    source = source.reshape(targets.shape) - row * n
    source[row, marks_at[:, :-1]] += 1  # a mark's place is one before its run's text
    source[:, -1] = 0
    is_text = np.ones(targets.shape, dtype=bool)
    is_text[row, marks_at] = False
    text_at = np.flatnonzero(is_text).reshape(R, noise) - row * targets.shape[1]
    return Corrupted(inputs, targets, source, text_at, marks_at)
