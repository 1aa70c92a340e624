"""Prefix language modelling: a suffix is predicted from a prefix whose tokens see each other in both directions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanopre import hookimpl
from nanopre.data import Split, random32, row_keys, window_starts
from nanopre.generate import answer
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


@dataclass
class PrefixLM:
    """Predict a suffix from a prefix (Raffel et al., 2020, section 3.2.3), in a decoder or in an encoder-decoder.

    A decoder's row is the whole text; the prefix's tokens see each other in both directions. An encoder-decoder reads the
    prefix in its encoder and writes the suffix with its decoder.
    """

    architectures = ("decoder", "encoder-decoder")
    splits_streams = False  # as an encoder-decoder does; `adapt` looks

    def adapt(self, model):
        self.splits_streams = model.config.architecture == "encoder-decoder"
        return model

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return -(-split.n_tokens // seq_len)

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens" (R, T), "visible" (R,), "targets" (R, T)} and, for an encoder-decoder, "decoder_tokens" (R, T), of
        T = seq_len. A window of T + 1 tokens is cut behind its first p = "visible" tokens, uniform on 1 .. T; the tokens
        from p on are predicted, the first of them from position p - 1: no position that sees a target is scored on it.
        In an evaluation the last window ends where the split does, and is cut in what it has.
        """
        starts = rows * seq_len if seed is None else window_starts(split, rows, seq_len, seed)
        window = split.gather(starts % split.n_tokens, seq_len + 1)  # (R, T + 1)
        cuts = seq_len if seed is not None else np.clip(split.n_tokens - 1 - starts, 1, seq_len)
        # 32 random bits times a number, of which the upper 32 bits are uniform below it but for one part in 2**32 / number.
        draws = random32(row_keys(seed, rows, 0), 1)[:, 0].astype(np.int64)
        prefix = 1 + (draws * cuts >> 32)  # (R,)

        place = np.arange(seq_len)
        if self.splits_streams:
            tokens = np.where(place < prefix[:, None], window[:, :-1], split.tokenizer.pad)
            source = prefix[:, None] + place  # where in the window the target at each place of the decoder is
            targets = np.take_along_axis(window, np.minimum(source, seq_len), axis=1)
            decoder_tokens = np.concatenate((np.full((len(rows), 1), split.tokenizer.pad), targets[:, :-1]), axis=1)
            hidden = source > seq_len
        else:
            tokens, source = window[:, :-1], np.broadcast_to(1 + place, (len(rows), seq_len))
            targets, decoder_tokens = window[:, 1:], None
            hidden = source < prefix[:, None]
        if seed is None:  # the last row goes on past the end of the split, where nothing is scored
            hidden = hidden | (starts[:, None] + source >= split.n_tokens)
        batch = {"tokens": tokens, "visible": prefix, "targets": np.where(hidden, IGNORE, targets)}
        return batch if decoder_tokens is None else {**batch, "decoder_tokens": decoder_tokens}

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """How many targets the loss is divided by, and how many bytes of text they stand for."""
        targets = batch["targets"][batch["targets"] != IGNORE]
        return {"loss": len(targets), "bytes": int(tokenizer.bytes_per_token[targets].sum())}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scored = batch["targets"] != IGNORE  # about half of the positions: the others do not meet the vocabulary
        return {"loss": head.cross_entropy(h[scored], batch["targets"][scored])}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss in nats a target, and in bits a byte of the suffixes, which compares across tokenizers."""
        bits_per_byte = sums["loss"] / math.log(2) / max(1, counts["bytes"])
        return {"loss": sums["loss"] / counts["loss"], "bits_per_byte": bits_per_byte}

    def sample(self, run, prompt: str, options: dict) -> dict:
        """The prompt and what follows it; the model reads the prompt in both directions, as it has learned to."""
        prefix = run.tokenizer.encode(prompt).tolist()[-run.model.config.seq_len :] or [run.tokenizer.eot]
        return {"text": prompt + run.tokenizer.decode(answer(run.model, run.tokenizer, prefix, **options))}


@hookimpl
def nanopre_objectives(register):
    register("prefix_lm", PrefixLM)
