"""Measured runs, and the laws that are fitted to them: what plan.py and the analyzers of plugins/scaling/ share.

An analyzer (a plugin) has `fit(runs) -> Law`. A law is a dataclass whose fields are its estimates, so that it can be
printed, written to JSON, read back and drawn again by a bootstrap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np


@dataclass
class Runs:
    """Points of training runs, one an entry of each array. All numbers are float64: 6 N D overflows int64."""

    params: np.ndarray  # N
    tokens: np.ndarray  # D, seen so far
    loss: np.ndarray  # nats a token
    flops: np.ndarray  # C, 6 N D where the source has none
    run: np.ndarray  # a label; points of one label are one training curve
    unique_tokens: np.ndarray  # at most D: what of the tokens was not seen before


class Allocation(NamedTuple):
    """How a law spends a budget. Numbers or arrays, as the budget is."""

    params: float
    tokens: float
    loss: float  # nan where the law has none


class Law(Protocol):
    """What an analyzer's `fit` gives: a dataclass whose fields are the estimates, all of them numbers."""

    definition: ClassVar[str]  # which parameters count, how FLOPs are counted, what is minimised: printed with every estimate

    def allocate(self, flops: float) -> Allocation:
        """The best parameters and tokens for a budget, and the loss that they reach."""

    def predict(self, params: float, tokens: float) -> float:
        """The loss of a model of `params` trained on `tokens`; only of laws that know more than the best models."""
