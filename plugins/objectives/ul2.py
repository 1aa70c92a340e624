"""UL2: a mixture of denoisers, each announced by a mode token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from nanopre import UserError, hookimpl
from nanopre.data import Split, random32, row_keys, window_starts
from nanopre.generate import answer, fill_sentinels
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
MOST_SPANS = 97  # sentinels that are left for spans


@cache
def sizes(seq_len: int, in_one_row: bool) -> list[tuple[int, int, int]]:
    """(raw tokens, noise tokens, spans) of each denoiser's rows: all the text of which the mode's token and the input fit
    seq_len, or the targets too where they follow in one row. Short spans run out of sentinels before a long row is full:
    they keep their law, and the row is padded. Raises UserError where a row has no room."""
    least = 6 if in_one_row else 4
    if seq_len < least:
        raise UserError(f"train.seq_len = {seq_len} is too short for a mode token and a text; take {least} or more.")
    result = []
    for mode, density, mean in DENOISERS:
        if mode == "S":
            result.append((seq_len - (2 if in_one_row else 1), 0, 0))
            continue
        length = raw_length(seq_len - 1, density, mean, MOST_SPANS)
        # In one row: the mode, the text, each sentinel twice, the end of text; the second end is only a target.
        while in_one_row and length + 2 * noise_counts(length, density, mean)[1] + 2 > seq_len:
            length -= 1
        result.append((length, *noise_counts(length, density, mean)))
    return result


@dataclass
class UL2:
    """Mixture of denoisers (Tay et al., 2022, section 3.1), equally often: regular and extreme spans, and suffixes.

    In an encoder-decoder, or in a decoder: its row is the input, whose tokens see each other in both directions, and the
    targets. The modes [R], [X] and [S] are the tokens <extra_id_97>, <extra_id_98> and <extra_id_99>.
    """

    architectures = ("decoder", "encoder-decoder")
    in_one_row = False  # a decoder's; `adapt` looks

    def adapt(self, model):
        self.in_one_row = model.config.architecture == "decoder"
        return model

    def rows_per_epoch(self, split: Split, seq_len: int) -> int:
        return -(-split.text.n_tokens // min(n for n, *_ in sizes(seq_len, self.in_one_row)))

    def batch(self, split: Split, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens" (R, seq_len), "visible" (R,), "targets" (R, T), "mode" (R,)} and, for an encoder-decoder,
        "decoder_tokens" (R, T): the mode's token and the input, and the targets, each padded, with T the longest targets of
        any denoiser; for a decoder T = seq_len, and the first target is scored at the input's last token. A denoiser that
        hides more is given more text; windows overlap by as much, and none is passed over."""
        tokenizer, running, R = split.tokenizer, split.text, len(rows)
        if len(tokenizer.sentinels) < 100:
            raise UserError(f"objective: UL2 needs 100 sentinels, but the vocabulary has {len(tokenizer.sentinels)}.")
        all_sizes = sizes(seq_len, self.in_one_row)
        stride = min(n for n, *_ in all_sizes)
        starts = rows * stride if seed is None else window_starts(running, rows, stride, seed)
        draws = random32(row_keys(seed, rows, 2), 2).astype(np.int64)
        which = draws[:, 0] * len(DENOISERS) >> 32  # (R,)
        mode = np.array([MODES[mode] for mode, *_ in DENOISERS])[which]
        longest = max(n // 2 + 1 if not spans else noise + spans + 1 for n, noise, spans in all_sizes)
        tokens = np.full((R, seq_len), tokenizer.pad)
        tokens[:, 0] = tokenizer.sentinels[mode]
        visible = np.zeros(R, dtype=np.int64)
        written = tokens if self.in_one_row else np.full((R, longest), tokenizer.pad)  # where each target is read again
        all_targets = np.full(written.shape, IGNORE)
        for i in np.unique(which):
            mine, (n, noise, spans) = np.flatnonzero(which == i), all_sizes[i]
            text = running.windows(starts[mine] % running.n_tokens, n)
            if DENOISERS[i][0] == "S":
                inputs, targets, source, end = self.suffix(text, draws[mine, 1], tokenizer)
            else:
                keys = row_keys(seed, rows[mine], 0), row_keys(seed, rows[mine], 1)
                inputs, targets, source, *_ = corrupt(text, keys, noise, spans, tokenizer)
                end = np.full(len(mine), inputs.shape[1])
            visible[mine] = 1 + end
            tokens[mine, 1 : 1 + inputs.shape[1]] = inputs
            there = targets != IGNORE
            row, at = np.nonzero(there)
            first = end[row] if self.in_one_row else 0
            # The last target of a row is never read again: what would hold it may be beyond the row's end.
            read = at + 1 < there.sum(axis=1)[row]
            written[mine[row[read]], (first + at)[read] + 1] = targets[there][read]
            if seed is None:  # the last row's text goes on past the end of the split, where nothing is scored
                targets = np.where(starts[mine, None] + source >= running.n_tokens, IGNORE, targets)
            all_targets[mine[row], first + at] = targets[there]
        batch = {"tokens": tokens, "visible": visible, "targets": all_targets, "mode": mode}
        return batch if self.in_one_row else {**batch, "decoder_tokens": written}

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

    def sample(self, run, prompt: str, options: dict) -> dict:
        """What the sentinels of a prompt hide, in mode R; what follows a prompt without any, in mode S."""
        model, tokenizer = run.model, run.tokenizer
        regular, suffix = (int(tokenizer.sentinels[MODES[mode]]) for mode in "RS")
        if any(f"<extra_id_{i}>" in prompt for i in range(MOST_SPANS)):
            spans = fill_sentinels(model, tokenizer, prompt.rstrip("\n"), mode=(regular,), **options)
            return {"spans": spans, "text": "\n".join(f"{name} {span}" for name, span in spans.items())}
        text = tokenizer.encode(prompt).tolist()[-(model.config.seq_len - 2) :]
        made = answer(model, tokenizer, [suffix, *text, tokenizer.eot], **options)
        return {"text": prompt + tokenizer.decode(made)}


@hookimpl
def nanopre_objectives(register):
    register("ul2", UL2)
