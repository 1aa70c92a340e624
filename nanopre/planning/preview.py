"""What a config tells of a run before there is a corpus: its model, and the widths of its batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanopre import UserError, checkpoint
from nanopre.config import Config
from nanopre.data import Split
from nanopre.distributed import adapted, padded_vocabulary
from nanopre.model import Transformer
from nanopre.tokenizer import SPECIAL_TOKENS, bytes_tokenizer

MOST_TOKENS = 2**22  # of a row: longer ones take minutes and gigabytes to make up


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
    padded = padded_vocabulary(n)
    return padded, source if padded == n else f"{source}, padded from {n:,}"


def shape(config: Config, n_rows: int = 0) -> Transformer:
    """The config's model, as its objective needs it, on the device "meta": its parameters have shapes, and no numbers.

    n_rows: of the embedding; 0: those of `vocabulary`. Raises UserError where the objective is not for this architecture.
    """
    with torch.device("meta"):
        return adapted(config, config.model.build(n_rows or vocabulary(config)[0], config.train.seq_len))


def example(config: Config) -> dict[str, Tensor]:
    """A row of the objective's batches, of random bytes, for its widths. Raises UserError for rows that are too long to make
    up, and for an objective that learns from examples, whose widths are those of the examples."""
    objective, T = config.objective, config.train.seq_len
    if hasattr(objective, "columns"):
        raise UserError(
            f"objective.name = {objective._plugin_name}: a plan is for pre-training, and this objective learns from examples; "
            "name one that learns from text."
        )
    if T > MOST_TOKENS:
        raise UserError(f"train.seq_len = {T}: a plan is for rows of at most {MOST_TOKENS:,} tokens.")
    n = 16 * (T + 8)
    tokens = np.random.default_rng(0).integers(0, 256, n).astype(np.uint16)
    split = Split(tokens, np.arange(0, n + 1, n // 4), np.arange(0, n + 1, 8), n, bytes_tokenizer())
    objective.rows_per_epoch(split, T)
    batch = objective.batch(split, np.arange(1), T, config.seed)
    return {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in batch.items()}
