"""T5's span corruption: the decoder writes out the spans that the encoder's input hides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanopre import UserError, hookimpl
from nanopre.config import at_least, fraction
from nanopre.data import Split, row_keys, window_starts
from nanopre.loss import IGNORE
from nanopre.spans import corrupt, noise_counts, raw_length
from nanopre.tokenizer import Tokenizer


@dataclass
class SpanCorruption:
    """Replace random spans by sentinels; the decoder writes the spans out (Raffel et al., 2020, section 3.1.4)."""

    noise_density: float = 0.15  # fraction of the tokens that is hidden
    mean_span_length: float = 3.0  # tokens

    architectures = ("encoder-decoder",)

    def __post_init__(self):
        fraction(self, "noise_density")
        at_least(self, mean_span_length=1)

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return -(-split.text.n_tokens // raw_length(seq_len, self.noise_density, self.mean_span_length))

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens" (R, S), "decoder_tokens", "targets" (R, T), "text_at" (R, noise), "marks_at" (R, spans + 1)}, S at most
        seq_len, and no "visible": every row is full. Input: the text with a sentinel for each span, then the end of text;
        targets: each sentinel with what it hid, then the end of text. "text_at" and "marks_at" are the targets that are text,
        and those that are not.

        A row is made from raw_length tokens, without regard to documents, by nanopre.spans.corrupt. As in T5's own packing,
        nothing marks the end of a document inside it: a mark could be hidden, or rows would not all be of one width.
        """
        length = raw_length(seq_len, self.noise_density, self.mean_span_length)
        noise, spans = noise_counts(length, self.noise_density, self.mean_span_length)
        tokenizer = split.tokenizer
        if spans > len(tokenizer.sentinels):
            raise UserError(
                f"objective: {spans} spans in {length} tokens, but the vocabulary has {len(tokenizer.sentinels)} sentinels; "
                "raise mean_span_length, or lower noise_density or train.seq_len."
            )
        running = split.text
        starts = rows * length if seed is None else window_starts(running, rows, length, seed)
        text = running.windows(starts % running.n_tokens, length)
        keys = row_keys(seed, rows, 0), row_keys(seed, rows, 1)
        tokens, targets, source, text_at, marks_at = corrupt(text, keys, noise, spans, tokenizer)
        start = np.full((len(rows), 1), tokenizer.pad)
        decoder_tokens = np.concatenate((start, targets[:, :-1]), axis=1)
        if seed is None:  # the last row's text goes on past the end of the split, where nothing is scored
            targets = np.where(starts[:, None] + source >= running.n_tokens, IGNORE, targets)
        return {
            "tokens": tokens,
            "decoder_tokens": decoder_tokens,
            "targets": targets,
            "text_at": text_at,
            "marks_at": marks_at,
        }

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        text = np.take_along_axis(batch["targets"], batch["text_at"], axis=1)
        return {"loss": int((batch["targets"] != IGNORE).sum()), "text": int((text != IGNORE).sum())}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        def at(places: Tensor) -> Tensor:
            return head.cross_entropy(
                torch.take_along_dim(h, places.unsqueeze(-1), 1), torch.take_along_dim(batch["targets"], places, 1)
            )

        text = at(batch["text_at"])
        return {"loss": text + at(batch["marks_at"]), "text": text.detach()}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss in nats a target, and that of the text alone: sentinels are nearly free."""
        return {"loss": sums["loss"] / counts["loss"], "text_loss": sums["text"] / max(1, counts["text"])}


@hookimpl
def nanopre_objectives(register):
    register("span_corruption", SpanCorruption)
