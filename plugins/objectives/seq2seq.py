"""Text to text: an encoder-decoder is fine-tuned to write a target for a source."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
from torch import Tensor

from nanopre import UserError, hookimpl, metrics
from nanopre.config import at_least
from nanopre.examples import Examples, constant, lay_out, visit
from nanopre.generate import answer
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


@dataclass
class Seq2Seq:
    """Every task as text to text (Raffel et al., 2020, section 2.4): "cola sentence: {sentence}" to "acceptable"."""

    template: str = "{source}"  # the source; names in braces are columns
    target: str = "target"  # column
    max_target: int = 64  # tokens, with the end of text
    round_target: float = 0.0  # to multiples of this, as STS-B's scores to 0.2, so that they are few words; 0: as written
    eval_examples: int = 200  # of the validation part, that are decoded for exact match and F1; 0: none

    architectures = ("encoder-decoder",)

    def __post_init__(self):
        at_least(self, max_target=2, round_target=0, eval_examples=0)
        if not self.names():
            raise ValueError(f'template = "{self.template}" must name a column in braces')
        self._sources = []  # [(examples, their sources)], which are put together once

    def names(self) -> list[str]:
        return list(dict.fromkeys(re.findall(r"\{(\w+)\}", self.template)))

    def columns(self) -> list[str]:
        return [*self.names(), self.target]

    def prepare(self, train: Examples, val: Examples) -> None:
        """Round the targets, where that is asked for (Raffel et al., 2020, section 2.4)."""
        if self.round_target:
            for split in (train, val):
                split.columns[self.target] = [self.rounded(target) for target in split.columns[self.target]]

    def rounded(self, target: str) -> str:
        """The multiple nearest to it, of two the even one: "4.5" by 0.2 is "4.4"."""
        step = Decimal(str(self.round_target))
        try:
            number = Decimal(target)
        except InvalidOperation:
            number = Decimal("nan")
        if not number.is_finite():
            raise UserError(
                f'objective.round_target = {self.round_target}: the column "{self.target}" has "{target}", which is no number; '
                "leave it out to have the targets as they are written."
            )
        return str(((number / step).to_integral_value() * step).quantize(step))

    def source(self, texts: dict[str, str]) -> str:
        """The template with each column's text in its place."""
        return re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], self.template)

    def sources(self, split: Examples) -> Examples:
        """The sources of all examples, in one column."""
        for known, sources in self._sources:
            if known is split:
                return sources
        records = zip(*(split.columns[name] for name in self.names()), strict=True)
        texts = [self.source(dict(zip(self.names(), record, strict=True))) for record in records]
        self._sources.append((split, Examples({"source": texts}, split.tokenizer)))
        return self._sources[-1][1]

    def rows_per_epoch(self, split: Examples, seq_len: int) -> int:
        return len(split)

    def batch(self, split: Examples, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens" (R, seq_len), "visible" (R,), "decoder_tokens", "targets" (R, max_target)}. The source and the target
        each end in the end of text, and lose tokens from the back where they are too long; the decoder starts from
        [PAD]."""
        if self.max_target > seq_len:
            raise UserError(f"objective.max_target = {self.max_target} is more than train.seq_len = {seq_len}; lower it.")
        index, beyond = visit(rows, len(split), seed)
        tokenizer, end = split.tokenizer, constant(split.tokenizer.eot, len(index))
        tokens, starts = self.sources(split).tokens("source")
        source = (tokens, starts[index], np.minimum(np.diff(starts)[index], seq_len - 1))
        tokens, starts = split.tokens(self.target)
        target = (tokens, starts[index], np.minimum(np.diff(starts)[index], self.max_target - 1))
        inputs, ends = lay_out([source, end], seq_len, tokenizer.pad)
        start = constant(tokenizer.pad, len(index))
        decoder_tokens, _ = lay_out([start, target], self.max_target, tokenizer.pad)
        targets, _ = lay_out([target, end], self.max_target, IGNORE)
        targets[beyond] = IGNORE
        return {"tokens": inputs, "visible": ends[:, -1], "decoder_tokens": decoder_tokens, "targets": targets}

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        return {"loss": int((batch["targets"] != IGNORE).sum())}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scored = batch["targets"] != IGNORE  # most targets are far shorter than the longest
        return {"loss": head.cross_entropy(h[scored], batch["targets"][scored])}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss in nats a target token."""
        return {"loss": sums["loss"] / max(1, counts["loss"])}

    def evaluate(self, model, split: Examples, seq_len: int) -> dict[str, float]:
        """Exact match and token F1 of greedy output."""
        n = min(self.eval_examples, len(split))
        if not n:
            return {}
        written = (self.write(model, split.tokenizer, source) for source in self.sources(split).columns["source"][:n])
        return metrics.score(zip(written, split.columns[self.target][:n], strict=True))

    def write(self, model, tokenizer: Tokenizer, source: str, **options) -> str:
        """The target that the model writes for a source; options as `generate` has them."""
        options = {"temperature": 0, **options, "max_tokens": self.max_target}
        tokens = tokenizer.encode(source)[: model.config.seq_len - 1].tolist() + [tokenizer.eot]
        return tokenizer.decode(answer(model, tokenizer, tokens, **options))

    def sample(self, run, prompt: str, options: dict) -> dict:
        """The target for a prompt, of several columns as texts with tabs between them."""
        texts = prompt.rstrip("\n").split("\t")
        if len(texts) != len(self.names()):
            raise UserError(f"the prompt must be {len(self.names())} texts: {' <tab> '.join(self.names())}.")
        source = self.source(dict(zip(self.names(), texts, strict=True)))
        return {"source": source, "text": self.write(run.model, run.tokenizer, source, **options)}


@hookimpl
def nanopre_objectives(register):
    register("seq2seq", Seq2Seq)
