"""UL2: a mixture of denoisers, each announced by a mode token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanopre import UserError, hookimpl
from nanopre.data import Split, random32, row_keys, window_starts
from nanopre.loss import IGNORE
from nanopre.spans import corrupt, noise_counts, raw_length
from nanopre.tokenizer import Tokenizer

# (mode, noise density, mean span length in tokens) (Tay et al., 2022, table 1); mode S is the suffix.
DENOISERS = [
    ("R", 0.15, 3.0),
    ("R", 0.15, 8.0),
    ("X", 0.5, 3.0),
    ("X", 0.5, 8.0),
    ("X", 0.15, 64.0),
    ("X", 0.5, 64.0),
    ("S", 0.25, 0.0),
]
MODES = {"R": 97, "X": 98, "S": 99}  # the last three sentinels are their tokens, so that no vocabulary needs others


@dataclass
class UL2:
    """Mixture of denoisers (Tay et al., 2022, section 3.1), equally often: regular and extreme spans, and suffixes."""

    architectures = ("encoder-decoder",)

    def lengths(self, seq_len: int) -> list[int]:
        """How many raw tokens a row of each denoiser is made from."""
        if seq_len < 4:
            raise UserError(f"train.seq_len = {seq_len} is too short for a mode token and a text; take 4 or more.")
        return [raw_length(seq_len - 1, d, mean) if mode != "S" else seq_len - 1 for mode, d, mean in DENOISERS]

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return -(-split.n_tokens // min(self.lengths(seq_len)))

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens" (R, seq_len), "visible" (R,), "decoder_tokens", "targets" (R, T), "mode" (R,)}: the mode's token and the
        input, and the targets, each padded, with T the longest targets of any denoiser. A denoiser that hides more is
        given more text; windows overlap by as much, and none is passed over."""
        tokenizer, all_lengths = split.tokenizer, self.lengths(seq_len)
        sizes = [
            noise_counts(n, d, mean) if mode != "S" else (0, 0)
            for n, (mode, d, mean) in zip(all_lengths, DENOISERS, strict=True)
        ]
        most = max(spans for _, spans in sizes)
        if most > min(MODES.values()) or len(tokenizer.sentinels) < 100:
            raise UserError(f"objective: {most} spans in a row, and UL2 has 97 sentinels; lower train.seq_len.")
        stride, R = min(all_lengths), len(rows)
        starts = rows * stride if seed is None else window_starts(split, rows, stride, seed)
        width = max(max(noise + spans + 1 for noise, spans in sizes), seq_len // 2 + 1)
        draws = random32(row_keys(seed, rows, 2), 2).astype(np.int64)
        which = draws[:, 0] * len(DENOISERS) >> 32  # (R,)
        batch = {
            "tokens": np.full((R, seq_len), tokenizer.pad),
            "visible": np.zeros(R, dtype=np.int64),
            "decoder_tokens": np.full((R, width), tokenizer.pad),
            "targets": np.full((R, width), IGNORE),
            "mode": np.array([MODES[mode] for mode, *_ in DENOISERS])[which],
        }
        batch["tokens"][:, 0] = tokenizer.sentinels[batch["mode"]]
        for i in np.unique(which):
            mine, mode = np.flatnonzero(which == i), DENOISERS[i][0]
            text = split.gather(starts[mine] % split.n_tokens, all_lengths[i])
            if mode == "S":
                inputs, targets, source, visible = self.suffix(text, draws[mine, 1], tokenizer)
            else:
                keys = row_keys(seed, rows[mine], 0), row_keys(seed, rows[mine], 1)
                inputs, targets, _, source = corrupt(text, keys, *sizes[i], tokenizer)
                visible = np.full(len(mine), inputs.shape[1])
            batch["tokens"][mine, 1 : 1 + inputs.shape[1]] = inputs
            batch["visible"][mine] = 1 + visible
            n = targets.shape[1]
            batch["decoder_tokens"][mine, 1:n] = np.where(targets[:, 1:] == IGNORE, tokenizer.pad, targets[:, :-1])
            if seed is None:  # the last row's text goes on past the end of the split, where nothing is scored
                targets = np.where(starts[mine, None] + source >= split.n_tokens, IGNORE, targets)
            batch["targets"][mine, :n] = targets
        return batch

    def suffix(self, text: np.ndarray, draws: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
        """(input, targets, where in the row each target comes from, length of the input): a prefix, and the suffix of 1 to
        half of the tokens, a quarter on average."""
        R, n = text.shape
        half = n // 2
        p = n - 1 - (draws * half >> 32)[:, None]  # (R, 1), how long the prefix is
        places = np.arange(n)
        inputs = np.where(places < p, text, np.where(places == p, tokenizer.eot, tokenizer.pad))
        source = p + np.arange(half + 1)
        targets = np.take_along_axis(text, np.minimum(source, n - 1), axis=1)
        targets = np.where(source < n, targets, np.where(source == n, tokenizer.eot, IGNORE))
        return inputs, targets, np.minimum(source, n - 1), p[:, 0] + 1

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        scored = (batch["targets"] != IGNORE).sum(axis=1)
        return {"loss": int(scored.sum()), **{mode: int(scored[batch["mode"] == i].sum()) for mode, i in MODES.items()}}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        sums = {}
        for mode, i in MODES.items():
            scored = (batch["targets"] != IGNORE) & (batch["mode"] == i).unsqueeze(1)
            sums[mode] = head.cross_entropy(h[scored], batch["targets"][scored])
        return {"loss": sum(sums.values()), **{mode: total.detach() for mode, total in sums.items()}}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss in nats a target, of all and of each mode."""
        modes = {f"{mode}_loss": sums[mode] / counts[mode] for mode in MODES if counts[mode]}
        return {"loss": sums["loss"] / counts["loss"], **modes}


@hookimpl
def nanopre_objectives(register):
    register("ul2", UL2)
