"""Extractive question answering: an encoder points at the answer's first and last token in a passage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopre import UserError, hookimpl, metrics
from nanopre.config import at_least
from nanopre.examples import Examples, constant, lay_out, visit
from nanopre.loss import IGNORE
from nanopre.tokenizer import Tokenizer


@dataclass
class SpanQA:
    """Start and end of the answer in a passage, as for SQuAD (Devlin et al., 2019, sections 4.2 and 4.3)."""

    question: str = "question"  # columns
    context: str = "context"
    answer: str = "answer"
    answer_start: str = "answer_start"  # where the answer begins in the context, in characters; -1 or "": there is none
    max_question: int = 64  # tokens
    doc_stride: int = 128  # tokens from one window of a long context to the next; at most half a window
    max_answer: int = 30  # tokens
    null_threshold: float = 0.0  # how much better than the best answer "no answer" must be scored to be given
    eval_examples: int = 200  # of the validation part, that are answered for exact match and F1; 0: none

    architectures = ("encoder",)

    def __post_init__(self):
        at_least(self, max_question=1, doc_stride=1, max_answer=1, eval_examples=0)
        self._windows = []  # [Windows], of each examples and length that were asked for

    def columns(self) -> list[str]:
        return [self.question, self.context, self.answer, self.answer_start]

    def adapt(self, model):
        model.head.drop_projection()
        model.head.add_output("span", 2)
        return model

    def windows(self, split: Examples, seq_len: int) -> Windows:
        for known in self._windows:
            if known.split is split and known.seq_len == seq_len:
                return known
        self._windows.append(Windows(self, split, seq_len))
        return self._windows[-1]

    def rows_per_epoch(self, split: Examples, seq_len: int) -> int:
        return len(self.windows(split, seq_len).example)

    def batch(self, split: Examples, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens", "segments" (R, seq_len), "visible", "starts", "ends" (R,)} of rows [CLS] question [SEP] window [SEP]. A
        context that does not fit is cut into windows that overlap, each a row. An answer that does not lie whole in the
        window is at [CLS], position 0."""
        windows = self.windows(split, seq_len)
        index, beyond = visit(rows, len(windows.example), seed)
        batch = windows.rows(index)
        for name in ("starts", "ends"):
            batch[name] = np.where(beyond, IGNORE, batch[name])
        return batch

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        n = int((batch["starts"] != IGNORE).sum())
        return {"loss": n, "right": n}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        start, end = head.output("span", h).unbind(dim=-1)  # (B, T) each
        sums = [
            F.cross_entropy(logits, batch[name], ignore_index=IGNORE, reduction="sum")
            for logits, name in ((start, "starts"), (end, "ends"))
        ]
        right = (start.argmax(dim=1) == batch["starts"]) & (end.argmax(dim=1) == batch["ends"])
        return {"loss": sum(sums) / 2, "right": right.sum()}

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean of both ends' losses in nats a window, and the share of windows in which both ends are right."""
        n = max(1, counts["loss"])
        return {"loss": sums["loss"] / n, "accuracy": sums["right"] / n}

    def evaluate(self, model, split: Examples, seq_len: int) -> dict[str, float]:
        """Exact match and token F1 of the answers."""
        n = min(self.eval_examples, len(split))
        if not n:
            return {}
        part = Examples({name: texts[:n] for name, texts in split.columns.items()}, split.tokenizer)
        answers = [answer["answer"] for answer in self.answers(model, part, seq_len)]
        answered = self.windows(split, seq_len).answer_first[:n] >= 0  # else "" is right, as in training
        truths = [text if has else "" for text, has in zip(part.columns[self.answer], answered, strict=True)]
        return metrics.score(zip(answers, truths, strict=True))

    @torch.inference_mode()
    def answers(self, model, split: Examples, seq_len: int) -> list[dict]:
        """{"answer", "score"} of each example: the part of the context from a start to an end behind it with the greatest
        sum of logits, both of the window that gives the start most context (in google-research/bert, run_squad.py);
        "" where [CLS], in the window that has least for it, has more than null_threshold above that. The score is the
        answer's above the null answer's. One example or more."""
        windows = Windows(self, split, seq_len)
        device = next(model.parameters()).device
        logits = []
        for first in range(0, len(windows.example), 32):
            batch = windows.rows(np.arange(first, min(first + 32, len(windows.example))))
            inputs = {key: torch.from_numpy(array).to(device) for key, array in batch.items()}
            spans = model(**inputs, loss=lambda head, h, _: {"span": head.output("span", h)})["span"]
            logits.append(spans.float().cpu().numpy())
        logits = np.concatenate(logits)  # (windows, T, 2)

        results = []
        for i, text in enumerate(split.columns[self.context]):
            rows = np.flatnonzero(windows.example == i)
            n = len(windows.ends[i])
            scores = np.full((n, self.max_answer), -np.inf)  # [s, k]: from token s to token s + k
            most = np.full(n, -1.0)  # context that any window so far has given each token, on the poorer side
            offset = 2 + windows.n_question[i]
            for row in rows:
                first, length = windows.first[row], windows.length[row]
                places = np.arange(length)  # in the window
                context = np.minimum(places, places[::-1]) + 0.01 * length
                better = context > most[first : first + length]
                start, end = logits[row, offset : offset + length].T
                ends = np.concatenate((end, np.full(self.max_answer, -np.inf)))
                spans = start[:, None] + np.lib.stride_tricks.sliding_window_view(ends, self.max_answer)[:length]
                scores[first + places[better]] = spans[better]
                most[first + places[better]] = context[better]
            null = logits[rows, 0].sum(axis=1).min()
            top = float(scores.max()) if n else -np.inf
            answer = ""
            if n and not null - top > self.null_threshold:
                s, k = np.unravel_index(scores.argmax(), scores.shape)
                edges = np.concatenate(([0], windows.ends[i]))
                answer = text.encode()[edges[s] : edges[s + k + 1]].decode(errors="ignore").strip()
            results.append({"answer": answer, "score": float(top - null)})
        return results

    def sample(self, run, prompt: str, options: dict) -> dict:
        """The answer to "question<tab>context"."""
        question, tab, context = prompt.rstrip("\n").partition("\t")
        if not tab or not context.strip():
            raise UserError("the prompt must be two texts with a tab between them: question <tab> context.")
        columns = {self.question: [question], self.context: [context], self.answer: [""], self.answer_start: ["-1"]}
        result = self.answers(run.model, Examples(columns, run.tokenizer), run.model.config.seq_len)[0]
        return {**result, "text": result["answer"] or "(no answer)"}


class Windows:
    """The windows of all examples' contexts, and where the answers are in them."""

    def __init__(self, objective: SpanQA, split: Examples, seq_len: int):
        self.split, self.seq_len = split, seq_len
        questions, starts = split.tokens(objective.question)
        self.n_question = np.minimum(np.diff(starts), objective.max_question)
        self.questions = questions, starts[:-1], self.n_question
        room = seq_len - 3 - self.n_question  # for the context
        if len(split) and room.min() < 1:
            raise UserError(
                f"train.seq_len = {seq_len} leaves no room for a context beside a question of {self.n_question.max()} tokens; "
                "raise it, or lower objective.max_question."
            )
        contexts = split.columns[objective.context]  # each is often there for several questions
        tokenized = {text: split.tokenizer.encode_with_ends(text) for text in dict.fromkeys(contexts)}
        encoded = [tokenized[text] for text in contexts]
        self.ends = [ends for _, ends in encoded]  # of each token in the context, in bytes
        sizes = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
        self.contexts = np.concatenate([*(ids for ids, _ in encoded), np.zeros(0)]).astype(np.int64)
        self.context_starts = np.cumsum(sizes) - sizes
        stride = np.minimum(objective.doc_stride, -(-room // 2))
        n_windows = 1 + -(-np.maximum(0, sizes - room) // stride)
        self.example = np.repeat(np.arange(len(split)), n_windows)  # of each window
        number = np.arange(len(self.example)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
        self.first = number * stride[self.example]  # its first token in the context
        self.length = np.minimum(room[self.example], sizes[self.example] - self.first)
        spans = [self._span(objective, i) for i in range(len(split))]
        self.answer_first, self.answer_last = np.array(spans, dtype=np.int64).reshape(-1, 2).T

    def _span(self, objective: SpanQA, i: int) -> tuple[int, int]:
        """First and last token of the answer in the context; (-1, -1): there is none."""
        columns = self.split.columns
        text, answer, start = (columns[name][i] for name in (objective.context, objective.answer, objective.answer_start))
        if start in ("", "-1") or not answer.strip():
            return -1, -1
        if not start.isdecimal() or text[int(start) : int(start) + len(answer)] != answer:
            raise UserError(
                f'{objective.answer_start}: the context of "{columns[objective.question][i]}" does not have the answer '
                f'"{answer}" at character {start}.'
            )
        # White space at an answer's edge is left out: a token may hold it together with the word outside.
        begin = len(text[: int(start)].encode()) + len(answer.encode()) - len(answer.lstrip().encode())
        end = begin + len(answer.strip().encode())
        first, last = np.searchsorted(self.ends[i], begin, side="right"), np.searchsorted(self.ends[i], end, side="left")
        return int(first), int(last)

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the windows with these numbers, as SpanQA.batch has them."""
        tokenizer, R, example = self.split.tokenizer, len(index), self.example[index]
        first, length = self.first[index], self.length[index]
        question = tuple(array if i == 0 else array[example] for i, array in enumerate(self.questions))
        context = (self.contexts, self.context_starts[example] + first, length)
        sep = constant(tokenizer.sep, R)
        tokens, ends = lay_out([constant(tokenizer.cls, R), question, sep, context, sep], self.seq_len, tokenizer.pad)
        places = np.arange(self.seq_len)
        segments = ((places >= ends[:, 2, None]) & (places < ends[:, 4, None])).astype(np.int64)
        inside = (self.answer_first[example] >= first) & (self.answer_last[example] < first + length)
        offset = ends[:, 2] - first
        return {
            "tokens": tokens,
            "segments": segments,
            "visible": ends[:, 4],
            "starts": np.where(inside, self.answer_first[example] + offset, 0),
            "ends": np.where(inside, self.answer_last[example] + offset, 0),
        }


@hookimpl
def nanopre_objectives(register):
    register("span_qa", SpanQA)
