"""What a config tells of a run before there is a corpus: its model, and the widths of its batches."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from nanopre import UserError, checkpoint
from nanopre.config import Config
from nanopre.data import Split
from nanopre.model import Transformer
from nanopre.tokenizer import SPECIAL_TOKENS, bytes_tokenizer


def vocabulary(config: Config) -> tuple[int, str]:
    """(rows of the embedding, in words where the number is from), without tokenising anything. Raises UserError where only
    the corpus could tell."""
    if getattr(config.model, "vocab_size", 0):
        return config.model.vocab_size, "model.vocab_size"
    t = config.tokenizer
    if config.init_from:
        n, source = checkpoint.read_tokenizer(config.init_from).n_vocab, f"the tokenizer of {config.init_from}"
    elif t.name == "bpe":  # fewer come out where the corpus is small
        n, source = t.vocab_size, "tokenizer.vocab_size"
    elif t.name == "chars":
        raise UserError(
            'tokenizer.name = "chars": how many characters there are, only the corpus tells; set model.vocab_size '
            "(--model.vocab_size=128)."
        )
    else:
        n, source = {"bytes": 256, "gpt2": 50_256}[t.name] + len(SPECIAL_TOKENS), f'tokenizer.name = "{t.name}"'
    padded = -(-n // 64) * 64
    return padded, source if padded == n else f"{source}, padded from {n:,}"


def shape(config: Config) -> Transformer:
    """The config's model on the device "meta": its parameters have shapes, and no numbers."""
    with torch.device("meta"):
        model = config.model.build(vocab_size=vocabulary(config)[0], seq_len=config.train.seq_len)
        return config.objective.adapt(model) if hasattr(config.objective, "adapt") else model


def example(config: Config) -> dict[str, Tensor]:
    """A row of the objective's batches, of random bytes, for its widths. Raises UserError for an objective that learns from
    examples, whose widths are those of the examples."""
    objective, T = config.objective, config.train.seq_len
    if hasattr(objective, "columns"):
        raise UserError(
            f"objective.name = {objective._plugin_name}: a plan is for pre-training, and this objective learns from examples; "
            "name one that learns from text."
        )
    n = 16 * (T + 8)
    tokens = np.random.default_rng(0).integers(0, 256, n).astype(np.uint16)
    split = Split(tokens, np.arange(0, n + 1, n // 4), np.arange(0, n + 1, 8), n, bytes_tokenizer())
    objective.rows_per_epoch(split, T)
    batch = objective.batch(split, np.arange(1), T, config.seed)
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in batch.items()}


def measured_seconds(run: Path) -> tuple[float, float | None]:
    """(seconds a step, MFU if it was noted) of a run: medians over the later half of its log.jsonl. Raises UserError."""
    log = run / "log.jsonl"
    try:
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "tokens_per_second" in line]
        later = steps[len(steps) // 2 :]
        speed = median(line["tokens_per_second"] for line in later)
        per_step = later[-1]["tokens"] / later[-1]["step"]
        return per_step / speed, median([line["mfu"] for line in later]) if "mfu" in later[-1] else None
    except (OSError, ValueError, KeyError, ArithmeticError, IndexError) as error:
        raise UserError(f"{log}: no steps to calibrate with ({error}).") from None
