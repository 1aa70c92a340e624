"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanopre import hookimpl
from nanopre.data import Split, window_starts
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


@dataclass
class CausalLM:
    """Predict each token from all tokens before it (Radford et al., 2018, section 3.1)."""

    architectures = ("decoder",)

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return -(-split.n_tokens // seq_len)

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens", "targets"}, each (len(rows), seq_len). Windows follow each other without regard to documents, which
        end in <|endoftext|>. With seed None, evaluation: rows 0 .. rows_per_epoch - 1 score every token but the first
        exactly once, and rows beyond them score none."""
        starts = rows * seq_len if seed is None else window_starts(split, rows, seq_len, seed)
        windows = split.gather(starts % split.n_tokens, seq_len + 1)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        if seed is None:
            beyond = starts[:, None] + np.arange(1, seq_len + 1) >= split.n_tokens
            targets = np.where(beyond, IGNORE, targets)
        return {"tokens": tokens, "targets": targets}

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """How many targets the loss is divided by, and how many bytes of text they stand for."""
        targets = batch["targets"][batch["targets"] != IGNORE]
        return {"loss": len(targets), "bytes": int(tokenizer.bytes_per_token[targets].sum())}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": head.cross_entropy(h, batch["targets"])}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss in nats a token, and in bits a byte of text, which compares across tokenizers."""
        bits_per_byte = sums["loss"] / math.log(2) / max(1, counts["bytes"])
        return {"loss": sums["loss"] / counts["loss"], "bits_per_byte": bits_per_byte}


@hookimpl
def nanopre_objectives(register):
    register("clm", CausalLM)
