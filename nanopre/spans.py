"""Spans of noise: how long, where, and what stands in their place. Pure functions, vectorised over the rows of a batch."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np

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
def raw_length(seq_len: int, density: float, mean_span: float) -> int:
    """The most raw tokens whose input, with a sentinel for each span and the end of text, fits seq_len: 568 for 512
    (Raffel et al., 2020, section 3.1.4). A density near 1 would allow any number; at most 4 seq_len."""

    def input_length(length: int) -> int:
        noise, spans = noise_counts(length, density, mean_span)
        return length - noise + spans + 1

    fitting = [length for length in range(1, 4 * seq_len + 1) if input_length(length) <= seq_len]
    if not fitting:
        raise ValueError(f"seq_len = {seq_len} holds no token beside the end of text")
    return fitting[-1]


def composition(keys: np.ndarray, total: int, parts: int) -> np.ndarray:
    """(len(keys), parts + 1) int64: 0, parts - 1 different cut points in ascending order, and `total`. All ways to cut
    `total` into `parts` positive lengths are equally likely."""
    edges = np.zeros((len(keys), parts + 1), dtype=np.int64)
    edges[:, -1] = total
    if parts > 1:
        bits = (total - 1).bit_length()
        # The lowest bits are the position, so that no two draws are equal and exactly parts - 1 are chosen.
        draws = random32(keys, total - 1) >> np.uint32(bits) << np.uint32(bits) | np.arange(total - 1, dtype=np.uint32)
        chosen = draws <= np.partition(draws, parts - 2, axis=1)[:, parts - 2, None]
        edges[:, 1:-1] = columns(chosen) + 1
    return edges


def columns(chosen: np.ndarray) -> np.ndarray:
    """(R, k): in which columns of (R, n) each row, which has k of them, is True. Several times faster than np.nonzero."""
    R, n = chosen.shape
    return np.flatnonzero(chosen).reshape(R, -1) - np.arange(0, R * n, n)[:, None]


def interleave(kept: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Raw positions (R, spans) at which the spans of noise start and end, from the edges (R, spans + 1) of both parts'
    compositions: a run that is kept, a span, a run that is kept, a span, ..."""
    return kept[:, 1:] + noise[:, :-1], kept[:, 1:] + noise[:, 1:]


def span_mask(starts: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """(R, length) bool: which positions lie in a row's spans."""
    steps = np.zeros((len(starts), length + 1), dtype=np.int8)
    np.put_along_axis(steps, starts, 1, axis=1)
    np.put_along_axis(steps, ends, -1, axis=1)  # no span starts where another ends
    return np.cumsum(steps[:, :-1], axis=1, dtype=np.int8).astype(bool)


def weave(tokens: np.ndarray, marks: np.ndarray, at: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """(R, n + k + 1) tokens of (R, n) `tokens` with `marks` (k,) or (R, k) at the ascending places `at` (R, k) of the
    result, and `end` behind them; and which of them are the tokens."""
    (R, n), k = tokens.shape, at.shape[1]
    is_token = np.ones((R, n + k + 1), dtype=bool)
    np.put_along_axis(is_token, at, False, axis=1)
    is_token[:, -1] = False
    woven = np.empty(is_token.shape, dtype=np.int64)
    woven[is_token] = tokens.reshape(-1)
    np.put_along_axis(woven, at, np.broadcast_to(marks, at.shape), axis=1)
    woven[:, -1] = end
    return woven, is_token


def corrupt(
    text: np.ndarray, keys: tuple[np.ndarray, np.ndarray], noise: int, spans: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """T5's span corruption (Raffel et al., 2020, section 3.1.4) of each row of `text` (R, n), from two keys a row.

    Returns the input (R, n - noise + spans + 1), the text with a sentinel for each span and the end of text; the targets
    (R, noise + spans + 1), each sentinel with what it hid and the end of text; and of each target whether it is text, and
    where in the row it comes from: a sentinel from its span's start, the end of text from 0. The lengths of the spans and
    of what lies between them are each drawn uniformly among all that are possible; a row begins with text and ends with a
    span.
    """
    R, n = text.shape
    kept_edges, noise_edges = composition(keys[0], n - noise, spans), composition(keys[1], noise, spans)
    first, last = interleave(kept_edges, noise_edges)
    is_noise = span_mask(first, last, n)
    sentinels, order = tokenizer.sentinels[:spans], np.arange(spans)
    inputs, _ = weave(text[~is_noise].reshape(R, -1), sentinels, kept_edges[:, 1:] + order, tokenizer.eot)
    at = noise_edges[:, :-1] + order
    targets, is_text = weave(text[is_noise].reshape(R, -1), sentinels, at, tokenizer.eot)
    source, _ = weave(columns(is_noise), first, at, 0)
    return inputs, targets, is_text, source
