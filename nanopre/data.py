"""Data is a function: the rows of any step follow from (seed, step) alone, with no loader's state to save.

A corpus is tokens on disk (nanopre/corpus.py makes them); an objective asks for rows of it by their numbers. Every random
choice is a hash of a counter, so that a rank can make any row without making those before it, and so that no library's
change of a random stream can change a run.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np

from nanopre.tokenizer import Tokenizer

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------------------------------
# Randomness from counters


GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al., 2014), in place, on a uint64 array."""
    t = x >> np.uint64(30)
    for shift, factor in ((27, 0xBF58476D1CE4E5B9), (31, 0x94D049BB133111EB)):
        x ^= t
        x *= np.uint64(factor)
        t = np.right_shift(x, np.uint64(shift), out=t if x.ndim else None)
    x ^= t
    return x


def hash64(*keys: int | np.ndarray) -> np.ndarray:
    """64 random bits (uint64) for each tuple of keys, which broadcast: the finaliser of splitmix64, once a key."""
    n_ints = next((i for i, key in enumerate(keys) if not isinstance(key, int)), len(keys))
    return _absorb(_absorb_ints(keys[:n_ints]), keys[n_ints:])


def _absorb(state: np.ndarray, keys: tuple) -> np.ndarray:
    for key in keys:
        x = np.array(key).astype(np.uint64)
        x += np.uint64(1)
        state = _mix(np.asarray(x + state * GOLDEN))  # of arrays, also of one number: only scalars warn when they wrap
    return state


@lru_cache(1024)
def _absorb_ints(keys: tuple[int, ...]) -> np.ndarray:
    """What seeds and streams, the same from batch to batch, make of the state."""
    state = _absorb(np.array(GOLDEN), keys)
    state.flags.writeable = False
    return state


def row_keys(seed: int | None, rows: np.ndarray, stream: int) -> np.ndarray:
    """A key (uint64) for each row, from which an objective draws what it does to the row; `stream` tells one of its kinds
    of draws from another. Rows are numbered through all epochs, so that each epoch draws anew. With seed None,
    evaluation, the draws are always the same."""
    return hash64(0, stream, rows) if seed is None else hash64(1, seed, stream, rows)


def random32(keys: np.ndarray, n: int) -> np.ndarray:
    """(len(keys), n) random uint32, row i from keys[i]: the sequence of splitmix64, two numbers a word. Several times
    faster than a hash64 of each position, and batches are made of these."""
    x = _mix(np.arange(1, (n + 1) // 2 + 1, dtype=np.uint64) * GOLDEN + keys[:, None])
    return x.astype("<u8", copy=False).view(np.uint32)[:, :n]


@lru_cache(64)
def _sides(n: int) -> tuple[int, int]:
    """(a, b) near sqrt(n), of which a * b is least beyond n."""
    root = math.isqrt(max(n - 1, 0)) + 1
    a = min(range(root, root + min(root // 4, 64) + 1), key=lambda a: -n % a)
    return a, -(-n // a)


def permute(index: np.ndarray, n: int, key: int | np.ndarray) -> np.ndarray:
    """Where a permutation of range(n), chosen by `key`, puts each index: computed, not stored.

    A Feistel network of eight rounds over pairs (left, right) of range(a) x range(b), the halves added to by turns modulo
    a and b (Black and Rogaway, 2002, section 5). An index that it puts beyond n goes through it again until it lands
    below.
    """
    a, b, one = *map(np.uint64, _sides(n)), np.uint64(1)
    result = np.array(index, dtype=np.uint64)
    flat = result.reshape(-1)
    rounds = hash64(np.asarray(key).reshape(1, -1), np.arange(8)[:, None])  # (8, 1 or the number of indices)
    rounds = np.broadcast_to(rounds, (8, flat.size))
    todo = np.arange(flat.size)
    while len(todo):
        (left, right), keys = np.divmod(flat[todo], b), rounds[:, todo]
        for r in range(0, 8, 2):  # with four, small ranges are visibly not uniform
            left = (left + (_mix(keys[r] + right) >> one)) % a  # 63 bits, so that the sum does not wrap
            right = (right + (_mix(keys[r + 1] + left) >> one)) % b
        flat[todo] = left * b + right
        todo = todo[flat[todo] >= np.uint64(n)]
    return result.astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens on disk


@dataclass
class Split:
    """The training or the validation part of a corpus, memory-mapped. Each document ends in <|endoftext|>."""

    tokens: np.ndarray  # uint16, or uint32 for more than 65,536 tokens
    documents: np.ndarray  # int64, where each document starts, and n_tokens
    sentences: np.ndarray  # int64, likewise; a document's start is a sentence's
    n_bytes: int  # of text, in UTF-8
    tokenizer: Tokenizer  # that made the tokens

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def text(self) -> Text:
        return Text(self)

    def gather(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length) tokens (int64) from each start on; after the split's end comes its start."""
        return self.windows(starts, length).astype(np.int64)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """As `gather`, in the type that the tokens have on disk, which is a quarter as large."""
        tokens, last = np.asarray(self.tokens), self.n_tokens - length
        if last < 0:
            return tokens[(starts[:, None] + np.arange(length)) % self.n_tokens]
        # Whole windows are copied several times faster than token by token; only those over the end need that.
        result = np.lib.stride_tricks.sliding_window_view(tokens, length)[np.minimum(starts, last)]
        over = np.flatnonzero(starts > last)
        if len(over):
            result[over] = tokens[(starts[over, None] + np.arange(length)) % self.n_tokens]
        return result


class Text:
    """A split's documents one behind the other, without the <|endoftext|> of each: for objectives that hide spans of running
    text, in which no special token may be."""

    def __init__(self, split: Split):
        self.split = split
        self.starts = np.asarray(split.documents) - np.arange(len(split.documents))  # of the documents, and n_tokens

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(len(starts), length) tokens from each start on, in the type that they have on disk; after the end comes the
        start."""
        first, last = self.ends_before(starts), self.ends_before(starts + length - 1)
        result = self.split.windows(starts + first, length)
        over = np.flatnonzero(first < last)
        if len(over):  # take as much more as there are ends inside, and leave those out
            begin, first, n_ends = starts[over] + first[over], first[over], (last - first)[over]
            wider = self.split.windows(begin, length + n_ends.max())
            stays = np.arange(wider.shape[1]) < length + n_ends[:, None]
            row = np.repeat(np.arange(len(over)), n_ends)
            ended = first[row] + np.arange(len(row)) - (np.cumsum(n_ends) - n_ends)[row]  # the number of each document
            rounds, ended = np.divmod(ended, len(self.starts) - 1)
            stays[row, rounds * self.split.n_tokens + self.split.documents[ended + 1] - 1 - begin[row]] = False
            result[over] = wider[stays].reshape(-1, length)
        return result

    def ends_before(self, places: np.ndarray) -> np.ndarray:
        """How many documents end before each place of the text, whose end is its start again."""
        rounds, places = np.divmod(places, self.n_tokens)
        return rounds * (len(self.starts) - 1) + np.searchsorted(self.starts, places, side="right") - 1


@dataclass
class Corpus:
    """A tokenised corpus."""

    train: Split
    val: Split  # may be empty
    fingerprint: str  # of the texts, the tokenizer and the split
    dir: Path

    @property
    def tokenizer(self) -> Tokenizer:
        return self.train.tokenizer


def window_starts(split: Split | Text, rows: np.ndarray, length: int, seed: int) -> np.ndarray:
    """Where the windows of some training rows start.

    Row r belongs to epoch r // n, n = ceil(n_tokens / length). Each epoch cuts the circle of tokens into windows from a
    point of its own and visits them in an order of its own, so that it sees every token, and no window's edge stays
    where it was.
    """
    n = -(-split.n_tokens // length)
    epochs, positions = np.divmod(np.asarray(rows, dtype=np.int64), n)
    phases = (hash64(seed, 0, epochs) % np.uint64(split.n_tokens)).astype(np.int64)
    windows = permute(positions, n, hash64(seed, 1, epochs))
    return (phases + windows * length) % split.n_tokens


def prefetch(make: Callable[[int], T], start: int, depth: int = 2) -> Iterator[T]:
    """Yield make(start), make(start + 1), ..., made ahead by a thread while the consumer works.

    An exception in `make` is raised here; closing the generator ends the thread.
    """
    made: queue.Queue = queue.Queue(depth)
    closed = threading.Event()

    def put(item) -> None:
        while not closed.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        step = start
        try:
            while not closed.is_set():
                put((make(step), None))
                step += 1
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()
