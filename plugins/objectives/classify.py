"""Classification of a text, or of a pair of texts, by the encoder's [CLS]."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopre import UserError, hookimpl
from nanopre.examples import Examples, Part, constant, lay_out, visit
from nanopre.loss import IGNORE
from nanopre.plugins import nearest
from nanopre.tokenizer import Tokenizer


@dataclass
class Classify:
    """Softmax on [CLS] through the pooler, fine-tuning the whole encoder (Devlin et al., 2019, section 4.1)."""

    text: str = "sentence"  # column of the text
    pair: str = ""  # column of a second text; "": there is none
    label: str = "label"  # column of the class
    labels: list[str] = field(default_factory=list)  # the classes; []: those of the training examples, sorted

    architectures = ("encoder",)

    def __post_init__(self):
        if len(set(self.labels)) < len(self.labels) or len(self.labels) == 1:
            raise ValueError(f"labels = {self.labels} must be two different ones or more")

    def columns(self) -> list[str]:
        return [self.text, *([self.pair] if self.pair else []), self.label]

    def prepare(self, train: Examples, val: Examples) -> None:
        """Find the classes where none are configured; the run's config then names them, so that the saved model knows."""
        found, configured = sorted(set(train.columns[self.label])), bool(self.labels)
        if not configured:
            if len(found) < 2:
                raise UserError(f'data.corpus: of the examples to train on, the column "{self.label}" has "{found[0]}" only.')
            self.labels = found
        for key, part in (("data.corpus", train), ("the validation examples", val)):
            for unknown in sorted(set(part.columns[self.label]) - set(self.labels))[:1]:
                hint = nearest(unknown, self.labels) + ("" if configured else " Or name all classes in objective.labels.")
                raise UserError(f'{key}: the label "{unknown}" is not among the classes; {hint}')

    def adapt(self, model):
        model.head.drop_projection()
        model.head.add_output("label", len(self.labels), pooled=True)
        return model

    def rows_per_epoch(self, split: Examples, seq_len: int) -> int:
        return len(split)

    def batch(self, split: Examples, rows: np.ndarray, seq_len: int, seed: int | None) -> dict[str, np.ndarray]:
        """{"tokens", "segments"} (len(rows), T) and {"visible", "classes"} (len(rows),). A row is [CLS] A [SEP], or [CLS] A
        [SEP] B [SEP] with B as the second segment. T is the longest row of the split, rounded up to a multiple of 16,
        and at most seq_len. Each epoch visits every example once, in an order of its own. With seed None, evaluation: in
        the examples' order, and rows beyond them have no class."""
        if seq_len < 5:
            raise UserError(f"train.seq_len = {seq_len} is too short for [CLS] A [SEP] B [SEP]; take 5 or more.")
        index, beyond = visit(rows, len(split), seed)
        longest = 1 + sum(np.diff(split.tokens(column)[1]).max() + 1 for column in self.columns()[:-1])
        texts = []
        for column in self.columns()[:-1]:
            tokens, starts = split.tokens(column)
            texts.append((tokens, starts[index], np.diff(starts)[index]))
        classes = self._classes(split)[index]
        classes[beyond] = IGNORE
        length = min(seq_len, -(-int(longest) // 16) * 16)
        return pack(texts, length, split.tokenizer) | {"classes": classes}

    def _classes(self, split: Examples) -> np.ndarray:
        number = {label: i for i, label in enumerate(self.labels)}
        return np.array([number[label] for label in split.columns[self.label]])

    def counts(self, batch: dict[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        n = int((batch["classes"] != IGNORE).sum())
        return {"loss": n, **{f"{kind}_{i}": n for i in range(len(self.labels)) for kind in ("right", "wrong")}}

    def loss(self, head, h: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The cross-entropy, in nats; of each class how many rows were rightly given it, and of how many rows it was either
        the class or what they were given, but not both."""
        logits = head.output("label", h, pooled=True)  # (B, n)
        classes = batch["classes"]
        n = logits.shape[1]
        scored = (classes != IGNORE).unsqueeze(1)
        given = F.one_hot(logits.detach().argmax(dim=1), n).bool() & scored
        true = F.one_hot(classes.clamp(min=0), n).bool() & scored
        sums = {"loss": F.cross_entropy(logits, classes, ignore_index=IGNORE, reduction="sum")}
        for kind, hits in (("right", given & true), ("wrong", given ^ true)):
            sums |= {f"{kind}_{i}": total for i, total in enumerate(hits.sum(dim=0, dtype=torch.float32).unbind())}
        return sums

    def report(self, sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
        """The mean loss, the accuracy, and the unweighted mean over the classes of F1 = 2 TP / (2 TP + FP + FN). A class
        that neither occurs nor was given has no F1."""
        right, wrong = ([sums[f"{kind}_{i}"] for i in range(len(self.labels))] for kind in ("right", "wrong"))
        f1 = [2 * r / (2 * r + w) for r, w in zip(right, wrong, strict=True) if r + w]
        n = max(1, counts["loss"])
        return {"loss": sums["loss"] / n, "accuracy": sum(right) / n, "macro_f1": sum(f1) / max(1, len(f1))}

    @torch.inference_mode()
    def sample(self, run, prompt: str, options: dict) -> dict:
        """The class of a prompt, of a pair as "text<tab>text", with the probability of each."""
        texts = prompt.rstrip("\n").split("\t")
        columns = self.columns()[:-1]
        if len(texts) != len(columns):
            wanted = "two texts with a tab between them" if self.pair else "one text without a tab"
            raise UserError(f"the prompt must be {wanted}: {' <tab> '.join(columns)}.")
        example = Examples({**dict(zip(columns, ([text] for text in texts), strict=True)), self.label: self.labels[:1]},
                           run.tokenizer)  # fmt: skip
        batch = self.batch(example, np.arange(1), run.model.config.seq_len, None)
        device = next(run.model.parameters()).device
        inputs = {key: torch.from_numpy(array).to(device) for key, array in batch.items()}
        parts = run.model(**inputs, loss=lambda head, h, _: {"logits": head.output("label", h, pooled=True)})
        p = parts["logits"][0].softmax(dim=0).tolist()
        probabilities = dict(sorted(zip(self.labels, p, strict=True), key=lambda item: -item[1]))
        label = next(iter(probabilities))
        lines = [f"{probability:7.1%}  {name}" for name, probability in probabilities.items()]
        return {"label": label, "probabilities": probabilities, "text": "\n".join(lines)}


def pack(texts: list[Part], seq_len: int, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP] in rows of seq_len. What is too long
    loses tokens from the back of the longer text, one at a time, B's first where both are as long."""
    lengths = [length for *_, length in texts]
    room = seq_len - 1 - len(texts)
    if len(texts) == 2:
        a, b = lengths
        a = np.minimum(a, np.maximum(room - b, -(-room // 2)))
        lengths = [a, np.minimum(b, room - a)]
    else:
        lengths = [np.minimum(lengths[0], room)]
    R = len(lengths[0])
    parts = [constant(tokenizer.cls, R)]
    for (tokens, starts, _), length in zip(texts, lengths, strict=True):
        parts += [(tokens, starts, length), constant(tokenizer.sep, R)]
    rows, ends = lay_out(parts, seq_len, tokenizer.pad)
    places = np.arange(seq_len)
    segments = ((places >= ends[:, 2, None]) & (places < ends[:, -1, None])).astype(np.int64)  # 1 behind the first [SEP]
    return {"tokens": rows, "segments": segments, "visible": ends[:, -1]}


@hookimpl
def nanopre_objectives(register):
    register("classify", Classify)
