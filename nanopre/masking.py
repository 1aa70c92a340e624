"""Which tokens are hidden, and by what: the pure functions that masked objectives share, vectorised over rows.

Shapes: R rows, T positions, K the most targets a row can have. A row's targets are the first n of its K slots; the slots
behind them name position 0 and have the target IGNORE, so that shapes never change.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from nanopre import UserError
from nanopre.data import Split, window_starts
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


def below(random: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """Random uint32 to numbers uniform in 0 .. n - 1 (int64), n below 2**31."""
    return ((random.astype(np.uint64) * np.asarray(n).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def select(mask: np.ndarray, a: np.ndarray | np.unsignedinteger, b: np.ndarray | np.unsignedinteger) -> np.ndarray:
    """np.where for unsigned integers of one type, by their bits: three to five times as fast."""
    signed = np.dtype(f"i{np.asarray(a).itemsize}")
    bits = np.negative(mask.view(np.int8)).astype(signed).view(np.asarray(a).dtype)  # all ones where the mask is true
    return b ^ ((a ^ b) & bits)


@lru_cache(8)
def ordinary_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """The ids that stand for text, by which a token may be replaced; special tokens stand for none."""
    return np.flatnonzero(tokenizer.bytes_per_token > 0)


def full_sentences(split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> tuple[np.ndarray, ...]:
    """[CLS] seq_len - 2 tokens of running text [SEP], across the ends of documents (Liu et al., 2019, section 4.2).

    Returns tokens (R, T) int64; lengths (R,) without padding; maskable (R, T), where text is that is no special token.
    With seed None, evaluation, the rows follow each other through the split once, and rows beyond hold no text.
    """
    tokenizer, length = split.tokenizer, seq_len - 2
    if length < 1:
        raise UserError(f"train.seq_len = {seq_len} leaves no room between [CLS] and [SEP]; take 3 or more.")
    starts = rows * length if seed is None else window_starts(split, rows, length, seed)
    text = split.gather(starts % split.n_tokens, length)
    n = np.full(len(rows), length) if seed is not None else np.clip(split.n_tokens - starts, 0, length)
    tokens = np.full((len(rows), seq_len), tokenizer.pad)
    tokens[:, 0] = tokenizer.cls
    within = np.arange(length) < n[:, None]
    tokens[:, 1:-1] = np.where(within, text, tokenizer.pad)
    tokens[np.arange(len(rows)), n + 1] = tokenizer.sep
    maskable = np.zeros(tokens.shape, dtype=bool)
    maskable[:, 1:-1] = within & (text != tokenizer.eot)
    return tokens, n + 2, maskable


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


def most_targets(fraction: float, seq_len: int) -> int:
    """K: how many targets a row can have."""
    return max(1, round(fraction * seq_len))


def target_counts(fraction: float, lengths: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """n (R,): the fraction of each row's tokens, [CLS] and [SEP] among them, at least one, as far as there are maskable ones
    (Devlin et al., 2019, create_pretraining_data.py)."""
    n_maskable = maskable.sum(axis=1, dtype=np.uint16 if maskable.shape[1] < 2**16 else np.int64)
    return np.minimum(np.maximum(1, np.rint(fraction * lengths)), n_maskable).astype(np.int64)


def choose_positions(random: np.ndarray, maskable: np.ndarray, k: int) -> np.ndarray:
    """(R, K) different positions of each row, in random order: the first n are uniform among its maskable ones, for any
    n up to their number. random (R, T) uint32; positions come back as int64."""
    # The low bits of each key are its position. So a sort, which is ten times faster than an argsort, tells where it was.
    T = maskable.shape[1]
    mask = np.uint32((1 << max(1, (T - 1).bit_length())) - 1)
    keys = select(maskable, (random & ~mask) | np.arange(T, dtype=np.uint32), np.uint32(0xFFFFFFFF))
    keys.sort(axis=1)
    return np.minimum(keys[:, :k] & mask, T - 1).astype(np.int64)


def choose_words(
    random: np.ndarray, maskable: np.ndarray, starts_word: np.ndarray, n: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(positions (R, K), counts (R,)): whole words in random order, but those that would make it more than n tokens.

    starts_word (R, T) marks the tokens that begin a word; a word ends at the next one, or where a token is not maskable. A
    row none of whose words fits gets one word all the same, of which at most K tokens.
    """
    R, T = maskable.shape
    index = np.arange(T)
    before = np.concatenate((np.zeros((R, 1), dtype=bool), maskable[:, :-1]), axis=1)
    first = maskable & (starts_word | ~before)
    head = np.maximum.accumulate(np.where(first, index, 0), axis=1)  # where each position's word begins
    # Sorted by (random number of the word, position), words lie in random order, each whole; the rest comes last.
    word_keys = np.take_along_axis(random.astype(np.int64), head, axis=1) * T + head
    keys = np.where(maskable, word_keys * T + index, np.iinfo(np.int64).max)
    order = np.argsort(keys, axis=1)
    head, left = np.take_along_axis(head, order, axis=1), np.take_along_axis(maskable, order, axis=1)
    words = np.arange(R)[:, None] * T + head
    sizes = np.bincount(words[left], minlength=R * T)[words]  # of each token's word
    offsets = order - head  # within it
    chosen = left & (offsets < k) & (head == head[:, :1])
    chosen &= ~(left & (sizes <= n[:, None])).any(axis=1, keepdims=True)  # only where no word fits
    budget = np.where(chosen.any(axis=1), 0, n)
    while True:  # each round takes words up to the first that is too long; seldom more than four rounds
        left &= ~chosen & (sizes <= budget[:, None])
        if not left.any():
            break
        fits = left & (np.cumsum(left, axis=1) - offsets + sizes - 1 <= budget[:, None])
        chosen |= fits
        budget = budget - fits.sum(axis=1)
    keys = np.where(chosen, index, 2 * T)
    slots = np.argsort(keys, axis=1)[:, :k]
    return np.take_along_axis(order, slots, axis=1), chosen.sum(axis=1)


@lru_cache(8)
def word_edges(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(opens, closes), each (n_vocab,) bool: which tokens begin, or end, with a character that is no letter or digit. A
    word begins at a token that opens or that follows one that closes. A part of a character counts as a letter."""
    opens, closes = np.zeros((2, tokenizer.n_vocab), dtype=bool)
    for i in ordinary_tokens(tokenizer):
        text = tokenizer.token_bytes([i]).decode(errors="replace")
        opens[i], closes[i] = (not (c.isalnum() or c == "\ufffd") for c in (text[0], text[-1]))
    return opens, closes


# ---------------------------------------------------------------------------------------------------------------------
# Replacing


def mask_tokens(
    tokens: np.ndarray,
    positions: np.ndarray,
    counts: np.ndarray,
    mask: int,
    random: np.ndarray | None = None,
    ordinary: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(positions, targets), each (R, K): the tokens at the first counts[i] positions of row i, and in the slots behind them
    position 0 and IGNORE. Writes, in place of each target, `mask`; with random (R, K) uint32, `mask` with probability 0.8, a
    token drawn from `ordinary` with 0.1, else what was there (Devlin et al., 2019, section 3.1)."""
    k = positions.shape[1]
    is_target = np.arange(k) < counts[:, None]
    positions = positions * is_target
    flat = positions + (np.arange(len(tokens)) * tokens.shape[1])[:, None]
    before = tokens.take(flat)
    new = before.copy()
    if random is None:
        np.copyto(new, mask, where=is_target)
    else:
        low, high = np.uint32(0.8 * 2**32), np.uint32(0.9 * 2**32)
        np.copyto(new, mask, where=is_target & (random < low))
        drawn = np.flatnonzero(is_target & (random >= low) & (random < high))
        rest = (random.reshape(-1)[drawn] - low).astype(np.uint64)  # uniform below high - low
        new.reshape(-1)[drawn] = ordinary[(rest * np.uint64(len(ordinary)) // np.uint64(high - low)).astype(np.int64)]
    tokens.reshape(-1)[flat] = new
    return positions, np.where(is_target, before, IGNORE)
