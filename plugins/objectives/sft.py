"""Supervised fine-tuning: a decoder learns to answer prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanopre import UserError, hookimpl, metrics
from nanopre.config import at_least
from nanopre.examples import Examples, constant, lay_out, visit
from nanopre.generate import generate
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


@dataclass
class SFT:
    """Prompt and response, with the loss on the response alone (Ouyang et al., 2022, section 3.5)."""

    template: str = "{prompt}"  # what comes before the response; the name in braces is a column
    response: str = "response"  # column
    eval_examples: int = 200  # of the validation part, that are decoded for exact match and F1; 0: none

    architectures = ("decoder",)

    def __post_init__(self):
        at_least(self, eval_examples=0)
        if len(re.findall(r"\{\w+\}", self.template)) != 1:
            raise ValueError(f'template = "{self.template}" must name one column in braces')
        self._prompts = []  # [(examples, their prompts)], which are put together once

    @property
    def column(self) -> str:
        return re.search(r"\{(\w+)\}", self.template)[1]

    def columns(self) -> list[str]:
        return [self.column, self.response]

    def prompts(self, split: Examples) -> Examples:
        """The prompts of all examples, in the template, in one column."""
        for known, prompts in self._prompts:
            if known is split:
                return prompts
        before, after = re.split(r"\{\w+\}", self.template)
        texts = [before + text + after for text in split.columns[self.column]]
        self._prompts.append((split, Examples({"prompt": texts}, split.tokenizer)))
        return self._prompts[-1][1]

    def rows_per_epoch(self, split: Examples, seq_len: int) -> int:
        return len(split)

    def batch(self, split: Examples, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens", "targets"}, each (R, seq_len), of the end of text (where a document begins), prompt, response, end of
        text. What is too long loses the prompt's front, so that the response stays; a response that alone is too long
        loses its back."""
        index, beyond = visit(rows, len(split), seed)
        tokenizer, end = split.tokenizer, constant(split.tokenizer.eot, len(index))
        tokens, starts = split.tokens(self.response)
        n_response = np.minimum(np.diff(starts)[index], seq_len - 1)
        response = (tokens, starts[index], n_response)
        tokens, starts = self.prompts(split).tokens("prompt")
        n_prompt = np.minimum(np.diff(starts)[index], seq_len - 1 - n_response)
        prompt = (tokens, starts[index + 1] - n_prompt, n_prompt)
        whole, ends = lay_out([end, prompt, response, end], seq_len + 1, tokenizer.pad)
        places = np.arange(1, seq_len + 1)  # of the targets, in the whole
        scored = (places >= ends[:, 1, None]) & (places < ends[:, 3, None]) & ~beyond[:, None]
        return {"tokens": whole[:, :-1], "targets": np.where(scored, whole[:, 1:], IGNORE)}

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        return {"loss": int((batch["targets"] != IGNORE).sum())}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        scored = batch["targets"] != IGNORE  # prompts and padding do not meet the vocabulary
        return {"loss": head.cross_entropy(h[scored], batch["targets"][scored])}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss in nats a token of the responses."""
        return {"loss": sums["loss"] / max(1, counts["loss"])}

    def evaluate(self, model, split: Examples, seq_len: int) -> dict[str, float]:
        """Exact match and token F1 of greedy responses. A long prompt loses its front, as in training: here so that the
        longest response would stay."""
        n = min(self.eval_examples, len(split))
        if not n:
            return {}
        tokens, starts = self.prompts(split).tokens("prompt")
        longest = min(seq_len, int(np.diff(split.tokens(self.response)[1]).max()) + 1)
        fronts = np.maximum(starts[:-1], starts[1:] - (seq_len - longest))
        prompts = (tokens[front:end] for front, end in zip(fronts[:n], starts[1:], strict=False))
        options = {"temperature": 0, "max_tokens": longest}
        responses = (self.answer(model, split.tokenizer, prompt, options) for prompt in prompts)
        return metrics.score(zip(responses, split.columns[self.response][:n], strict=True))

    def answer(self, model, tokenizer: Tokenizer, prompt: np.ndarray, options: dict) -> str:
        """The response to the tokens of a prompt in its template."""
        start = [tokenizer.eot, *prompt.tolist()]
        return tokenizer.decode(list(generate(model, start, n_vocab=tokenizer.n_vocab, stop=tokenizer.eot, **options)))

    def sample(self, run, prompt: str, options: dict) -> dict:
        """The response to a prompt, which is put into the template."""
        if not prompt.strip():
            raise UserError(f'--prompt: there is nothing to put into the template "{self.template}".')
        before, after = re.split(r"\{\w+\}", self.template)
        tokens = run.tokenizer.encode(before + prompt.rstrip("\n") + after)
        return {"text": self.answer(run.model, run.tokenizer, tokens, options)}


@hookimpl
def nanopre_objectives(register):
    register("sft", SFT)
