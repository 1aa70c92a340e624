"""BERT's two tasks: masked language modelling and next-sentence prediction; without the second, RoBERTa's one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from nanopre import UserError, hookimpl, masking
from nanopre.config import fraction
from nanopre.data import Split, hash64, permute, random32, row_keys
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


@dataclass
class MaskedLM:
    """Fill in masked tokens and tell whether B continues A, in [CLS] A [SEP] B [SEP] (Devlin et al., 2019, section 3.1).

    Pairs are fairer than in BERT's code, which calls 55 to 80% of them random, some of them true continuations: a window of
    a document is cut at one of its sentences, a fair coin decides, and a random B is as long as the true one would be,
    begins where a sentence begins, as the true one does, and comes from another document.
    """

    mask_fraction: float = 0.15  # of a row's tokens that are predicted: 80% of them masked, 10% replaced, 10% kept
    nsp: bool = True  # false: rows of running text without pairs (Liu et al., 2019, "full sentences")
    whole_word: bool = False  # mask the tokens of a word together
    short_fraction: float = 0.1  # of the pairs that are cut to a random length, in training

    architectures = ("encoder",)

    def __post_init__(self):
        fraction(self, "mask_fraction", "short_fraction")
        self._cache = []  # [(split, Windows)], for a split of which the windows are known

    def adapt(self, model):
        if self.nsp:
            model.head.add_output("nsp", 2, pooled=True)
        return model

    def windows(self, split: Split, seq_len: int) -> Windows:
        for known, windows in self._cache:
            if known is split and windows.length == seq_len - 3:
                return windows
        self._cache.append((split, Windows(split, seq_len - 3)))
        return self._cache[-1][1]

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return self.windows(split, seq_len).n if self.nsp else -(-split.n_tokens // (seq_len - 2))

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """R rows, at most K targets each:

        tokens (R, T); visible (R,), how many of them are not padding; positions and targets (R, K), IGNORE beyond the
        row's own number; with nsp also segments (R, T), 0 up to the first [SEP], then 1, and is_random (R,), 1 where B is
        from another document, 0 where it continues A, IGNORE in a row [CLS] A [SEP] for want of a sentence to cut at.
        """
        rows, tokenizer = np.asarray(rows, dtype=np.int64), split.tokenizer
        k = masking.most_targets(self.mask_fraction, seq_len)
        keys = row_keys(seed, rows, 2)
        random = random32(keys, seq_len + k + 4)
        for_choice, for_tokens, for_pairs = np.split(random, [seq_len, seq_len + k], axis=1)
        pairs = {}
        if self.nsp:
            tokens, lengths, maskable, pairs = self.pairs(split, rows, seq_len, seed, for_pairs, keys)
        else:
            tokens, lengths, maskable = masking.full_sentences(split, rows, seq_len, seed)
        n = masking.target_counts(self.mask_fraction, lengths, maskable)
        if self.whole_word:
            opens, closes = masking.word_edges(tokenizer)
            starts_word = opens[tokens]
            starts_word[:, 1:] |= closes[tokens[:, :-1]]
            positions, n = masking.choose_words(for_choice, maskable, starts_word, n, k)
        else:
            positions = masking.choose_positions(for_choice, maskable, k)
        ordinary = masking.ordinary_tokens(tokenizer)
        positions, targets = masking.mask_tokens(tokens, positions, n, tokenizer.mask, for_tokens, ordinary)
        return {"tokens": tokens, "visible": lengths, "positions": positions, "targets": targets, **pairs}

    def pairs(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None, random: np.ndarray, keys: np.ndarray):
        """(tokens (R, T), lengths (R,), maskable (R, T), {"segments", "is_random"}) before anything is masked, from
        random (R, 4) uint32 and a key for each row."""
        windows = self.windows(split, seq_len)
        document, start, end = windows.of_rows(rows, seed)
        if seed is not None:
            # Two tokens or more; a window that has fewer stays as it is.
            shorter = start + 2 + masking.below(random[:, 0], np.maximum(end - start - 1, 1))
            end = np.where(random[:, 1] < self.short_fraction * 2**32, np.minimum(shorter, end), end)

        # Cut at one of the sentences that begin inside; neither part is longer than a random one could be.
        first = np.searchsorted(windows.sentences, start, side="right")
        n_cuts = np.maximum(0, np.searchsorted(windows.sentences, end, side="left") - first)
        has_pair = n_cuts > 0
        cut = windows.sentences.take(first + masking.below(random[:, 2], n_cuts), mode="clip")
        cut = np.where(has_pair, cut, end)
        n_a, n_b = cut - start, np.minimum(end - cut, windows.longest_other(document))
        is_random = np.where(has_pair, (random[:, 3] & 1).astype(np.int64), IGNORE)
        source = cut.copy()
        drawn = np.flatnonzero(is_random == 1)
        source[drawn] = windows.elsewhere(document[drawn], n_b[drawn], keys[drawn])

        lengths = n_a + 2 + np.where(has_pair, n_b + 1, 0)
        short = np.int16 if seq_len < 2**15 else np.int32  # comparisons run faster
        index = np.arange(seq_len, dtype=short)
        in_b, maskable = index >= (n_a + 2).astype(short)[:, None], index < lengths.astype(short)[:, None]
        # Both texts where they stand in the row, with whatever stands around them in the split.
        both = split.windows(np.concatenate((start - 1, source - n_a - 2)) % split.n_tokens, seq_len)
        a, b = both[: len(rows)], both[len(rows) :]
        tokens = masking.select(maskable, masking.select(in_b, b, a), a.dtype.type(split.tokenizer.pad)).astype(np.int64)
        segments = (in_b & maskable).astype(np.int64)
        r, tokenizer = np.arange(len(rows)), split.tokenizer
        for column, special in ((0, tokenizer.cls), (n_a + 1, tokenizer.sep), (lengths - 1, tokenizer.sep)):
            tokens[r, column], maskable[r, column] = special, False
        return tokens, lengths, maskable, {"segments": segments, "is_random": is_random}

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """How many masked tokens, and how many pairs."""
        n = {"mlm": int((batch["targets"] != IGNORE).sum())}
        if self.nsp:
            n["nsp"] = int((batch["is_random"] != IGNORE).sum())
        return n | {f"{name}_correct": count for name, count in n.items()}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        positions = batch["positions"].unsqueeze(-1).expand(-1, -1, h.shape[-1])
        mlm, correct = head.cross_entropy(h.gather(1, positions), batch["targets"], count_correct=True)
        sums = {"mlm": mlm, "mlm_correct": correct}
        if self.nsp:
            labels = batch["is_random"]
            logits = head.output("nsp", h, pooled=True)
            sums["nsp"] = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
            sums["nsp_correct"] = (logits.argmax(dim=-1) == labels).sum().float()
        return sums

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss over masked tokens and the mean over pairs, in nats, their sum, and how many were right; nothing of a
        task that has no targets, as where no window has a second sentence."""
        mean = {name: total / max(1, counts[name]) for name, total in sums.items()}
        metrics = {"loss": mean["mlm"] + mean.get("nsp", 0.0)}
        for task in ("mlm", "nsp"):
            if counts.get(task):
                metrics |= {f"{task}_loss": mean[task], f"{task}_accuracy": mean[f"{task}_correct"]}
        return metrics


class Windows:
    """The windows of at most `length` tokens that a split's documents are cut into, each document from its start on."""

    TRIES = 16  # to find a text elsewhere, before the longest document gives it

    def __init__(self, split: Split, length: int):
        if length < 2:
            raise UserError(f"train.seq_len = {length + 3} is too short for [CLS] A [SEP] B [SEP]; take 5 or more.")
        self.length = length
        self.documents, self.sentences = np.asarray(split.documents), np.asarray(split.sentences)
        self.sizes = np.diff(self.documents) - 1  # without <|endoftext|>
        if (self.sizes > 0).sum() < 2:
            raise UserError(
                f"objective.nsp = true needs two documents or more with text in them, for pairs that do not belong together; "
                f"a split of {split.n_tokens} tokens has {(self.sizes > 0).sum()}: give more (for training in data.corpus, for "
                "validation in data.val_corpus or by a larger data.val_fraction), or set objective.nsp = false."
            )
        if len(self.sentences) - 1 <= (self.sizes > 0).sum():
            raise UserError(
                "objective.nsp = true needs documents of two sentences or more, for a B that continues A; in a split of "
                f"{split.n_tokens} tokens no document has a second one: give longer ones (for training in data.corpus, for "
                "validation in data.val_corpus or by a larger data.val_fraction), or set objective.nsp = false."
            )
        self.ends = np.cumsum(-(-self.sizes // length))  # of each document's windows, in all windows
        self.n = int(self.ends[-1])
        self.second, self.longest = np.argsort(self.sizes)[-2:]

    def of_rows(self, rows: np.ndarray, seed: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, start, end) of each row's window; of a row beyond an evaluation's last, an empty one."""
        if seed is None:
            windows, beyond = np.minimum(rows, self.n - 1), rows >= self.n
        else:
            epochs, places = np.divmod(rows, self.n)
            windows, beyond = permute(places, self.n, hash64(seed, 4, epochs)), False
        document = np.searchsorted(self.ends, windows, side="right")
        before = -(-self.sizes[document] // self.length)  # windows left from the document's first on
        first = self.documents[document]
        start = first + (windows - self.ends[document] + before) * self.length
        end = np.minimum(start + self.length, first + self.sizes[document])
        return document, start, np.where(beyond, start, end)

    def longest_other(self, document: np.ndarray) -> np.ndarray:
        """The size of the longest document but this one: so long a text there always is elsewhere."""
        return self.sizes[np.where(document == self.longest, self.second, self.longest)]

    def elsewhere(self, document: np.ndarray, n: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Where a text of n tokens begins, uniform among the sentences of other documents that have as many after them."""
        documents, sentences = self.documents, self.sentences
        found = documents[np.where(document == self.longest, self.second, self.longest)]  # if no draw fits
        todo = np.arange(len(n))
        for attempt in range(self.TRIES):
            draws = hash64(keys[todo], attempt) % np.uint64(len(sentences) - 1)
            start = sentences[draws.astype(np.int64)]
            other = np.searchsorted(documents, start, side="right") - 1
            fits = (other != document[todo]) & (start + n[todo] < documents[other + 1])
            found[todo[fits]] = start[fits]
            todo = todo[~fits]
            if not len(todo):
                break
        return found


@hookimpl
def nanopre_objectives(register):
    register("mlm_nsp", MaskedLM)
