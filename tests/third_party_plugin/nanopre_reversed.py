"""Causal language modelling from right to left: an objective that comes from outside of nanopre."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanopre import hookimpl
from nanopre.data import Split, window_starts
from nanopre.loss import IGNORE


@dataclass
class ReversedCausalLM:
    """Predict each token from all tokens after it."""

    loss_scale: float = 1.0  # what the reported loss is multiplied by

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return -(-split.n_tokens // seq_len)

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens", "targets"}, each (len(rows), seq_len), last token first."""
        starts = rows * seq_len if seed is None else window_starts(split, rows, seq_len, seed)
        windows = split.gather(starts % split.n_tokens, seq_len + 1)[:, ::-1]
        tokens, targets = windows[:, :-1], windows[:, 1:]
        if seed is None:
            beyond = starts[:, None] + np.arange(seq_len)[::-1] >= split.n_tokens
            targets = np.where(beyond, IGNORE, targets)
        return {"tokens": tokens, "targets": targets}

    def counts(self, batch: dict[str, np.ndarray], tokenizer) -> dict[str, float]:
        return {"loss": int((batch["targets"] != IGNORE).sum())}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": head.cross_entropy(h, batch["targets"])}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        return {"loss": self.loss_scale * sums["loss"] / counts["loss"]}


@hookimpl
def nanopre_objectives(register):
    register("reversed_clm", ReversedCausalLM)
