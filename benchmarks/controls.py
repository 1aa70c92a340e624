"""Objectives with nothing to learn in them, for benchmarks/convergence.py: what beats chance here is a leak. And one with a
leak on purpose."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from nanopre import hookimpl
from nanopre.data import random32, row_keys
from nanopre.loss import IGNORE
from nanopre.plugins import load_plugins

REGISTRY = load_plugins()  # plugins/ alone
CausalLM = REGISTRY.get("objective", "clm", __file__)
MaskedLM = REGISTRY.get("objective", "mlm_nsp", __file__)


@dataclass
class ShuffledTokens(CausalLM):
    """Causal LM on tokens from anywhere in the text: no better than the unigram. (Those of one window in random order are:
    a passage has its own words, and 300 steps gain 0.26 nats of that.)"""

    def batch(self, split, rows, seq_len, seed):
        batch = super().batch(split, rows, seq_len, seed)
        draws = random32(row_keys(seed, rows, stream=99), seq_len + 1).astype(np.int64)
        windows = split.tokens[draws * split.n_tokens >> 32].astype(np.int64)
        return {"tokens": windows[:, :-1], "targets": np.where(batch["targets"] == IGNORE, IGNORE, windows[:, 1:])}


@dataclass
class ShuffledLabels(MaskedLM):
    """MLM and NSP whose labels are coins: no better than a half."""

    def batch(self, split, rows, seq_len, seed):
        batch = super().batch(split, rows, seq_len, seed)
        coins = (random32(row_keys(seed, rows, stream=99), 1)[:, 0] & 1).astype(np.int64)
        return {**batch, "is_random": np.where(batch["is_random"] == IGNORE, IGNORE, coins)}


@dataclass
class AnyToken(MaskedLM):
    """MLM and NSP whose random B begins at any token, mostly within a sentence, while the true one begins a sentence: on the
    books 95% of the labels can be told by B's first token alone."""

    def windows(self, split, seq_len):
        windows = super().windows(split, seq_len)
        if windows.elsewhere.__self__ is windows:
            from_any = copy.copy(windows)
            from_any.sentences = np.arange(split.n_tokens + 1)
            windows.elsewhere = from_any.elsewhere
        return windows


@hookimpl
def nanopre_objectives(register):
    register("shuffled_tokens", ShuffledTokens)
    register("shuffled_labels", ShuffledLabels)
    register("any_token", AnyToken)
