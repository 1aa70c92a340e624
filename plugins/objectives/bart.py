"""BART's text infilling: the decoder writes the whole text, of which the encoder sees spans as single masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor

from nanopre import UserError, hookimpl
from nanopre.config import at_least, fraction
from nanopre.data import Split, random32, row_keys, window_starts
from nanopre.generate import answer, check_length, encode_masked
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


@dataclass
class BART:
    """Text infilling (Lewis et al., 2020, section 2.2): spans of Poisson lengths become one [MASK] each, a span of length 0
    inserts one; the decoder writes out the whole text."""

    mask_fraction: float = 0.3  # of the tokens that are hidden
    mean_span_length: float = 3.0  # tokens

    architectures = ("encoder-decoder",)

    def __post_init__(self):
        fraction(self, "mask_fraction")
        at_least(self, mean_span_length=0.1)

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        if seq_len < 2:
            raise UserError("train.seq_len = 1 holds no token beside the end of text; take 2 or more.")
        return -(-split.text.n_tokens // (seq_len - 1))

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens" (R, seq_len), "visible" (R,), "decoder_tokens", "targets" (R, n + 1)} of windows of n = seq_len - 1
        tokens. Spans are drawn until they hide ceil(mask_fraction * n) tokens, the last of them cut short, and lie anywhere
        between the tokens that stay. There are no more masks than hidden tokens, so that a row never grows."""
        n, R, tokenizer, running = seq_len - 1, len(rows), split.tokenizer, split.text
        starts = rows * n if seed is None else window_starts(running, rows, n, seed)
        text = running.windows(starts % running.n_tokens, n)
        budget = math.ceil(Fraction(str(self.mask_fraction)) * n)  # 0.07 * 100 is 7, and in floating point above it
        kept = n - budget
        # A sequence of Poisson lengths is one of lengths above 0, of which `budget` always suffice, with so many zeros
        # before each as there are failures before a success of probability 1 - P(0), P(0) = exp(-mean).
        draws = random32(row_keys(seed, rows, 0), 3 * budget)
        lengths = 1 + np.searchsorted(self.cumulative(), draws[:, :budget], side="right")  # (R, budget)
        before = np.cumsum(lengths, axis=1) - lengths
        is_span = before < budget
        lengths = np.where(is_span, np.minimum(lengths, budget - before), 0)
        zeros = np.floor(-np.log((draws[:, budget : 2 * budget] + 1.0) / 2**32) / self.mean_span_length)
        n_masks = np.minimum(is_span.sum(axis=1) + (zeros * is_span).sum(axis=1).astype(np.int64), budget)  # (R,)

        # Each mask lies behind so many of the tokens that stay. The order of masks that lie together tells nothing, so that
        # place and length can be sorted as one number; slots without a mask come last.
        is_mask = np.arange(budget) < n_masks[:, None]
        behind = draws[:, 2 * budget :].astype(np.int64) * (kept + 1) >> 32
        behind = np.sort(np.where(is_mask, behind, kept + 1) * (budget + 1) + lengths, axis=1)
        behind, lengths = np.divmod(behind, budget + 1)
        ends = np.minimum(behind + np.cumsum(lengths, axis=1), n)  # of the spans, in the text
        base = np.arange(R)[:, None] * (n + 1)
        edges = (np.bincount((base + at).ravel(), minlength=R * (n + 1)) for at in (ends - lengths, ends))
        stays = np.cumsum(np.subtract(*edges).reshape(R, n + 1), axis=1)[:, :-1] == 0  # (R, n), True kept times a row

        tokens = np.full((R, seq_len + 1), tokenizer.pad)  # the last column takes the masks that are not
        np.put_along_axis(tokens, np.where(is_mask, behind + np.arange(budget), seq_len), tokenizer.mask, axis=1)
        tokens = tokens[:, :seq_len]
        end = kept + n_masks
        is_text = (np.arange(seq_len) < end[:, None]) & (tokens != tokenizer.mask)
        tokens[is_text] = text[stays]
        tokens[np.arange(R), end] = tokenizer.eot
        targets = np.concatenate((text, np.full((R, 1), tokenizer.eot)), axis=1)
        decoder_tokens = np.concatenate((np.full((R, 1), tokenizer.pad), text), axis=1)
        if seed is None:  # the last row's text goes on past the end of the split, where nothing is scored
            source = np.minimum(np.arange(n + 1), n - 1)
            targets = np.where(starts[:, None] + source >= running.n_tokens, IGNORE, targets)
        return {"tokens": tokens, "visible": end + 1, "decoder_tokens": decoder_tokens, "targets": targets}

    def cumulative(self) -> np.ndarray:
        """P(length <= 1), P(length <= 2), ... of the Poisson distribution without 0, in units of 2**-32."""
        mean, longest = self.mean_span_length, int(self.mean_span_length + 12 * self.mean_span_length**0.5 + 12)
        p = [math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(1, longest)]
        return np.cumsum(p) / -math.expm1(-mean) * 2.0**32

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        return {"loss": int((batch["targets"] != IGNORE).sum())}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": head.cross_entropy(h, batch["targets"])}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss in nats a token, most of which the encoder has seen."""
        return {"loss": sums["loss"] / counts["loss"]}

    def sample(self, run, prompt: str, options: dict) -> dict:
        """The whole text that the decoder writes for a prompt in which each [MASK] stands for any number of tokens."""
        source = [*encode_masked(run.tokenizer, prompt.rstrip("\n")), run.tokenizer.eot]
        check_length(source, run.model)
        return {"text": run.tokenizer.decode(answer(run.model, run.tokenizer, source, **options))}


@hookimpl
def nanopre_objectives(register):
    register("bart", BART)
