"""Batch size and learning rate of a run that has not been tried, by published rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

WARMUP_STEPS = 2000  # LLaMA and DeepSeek LLM, at any size; here at most a twentieth of the run
WEIGHT_DECAY = 0.1  # GPT-3, Chinchilla, LLaMA


class Run(NamedTuple):
    """What the rules ask of a run."""

    flops: float  # 6 N D
    params: float  # outside of the embeddings
    tokens: float
    loss: float  # at the end; nan where it is not known


class Rule(NamedTuple):
    """A published rule for AdamW. A number that it does not give is nan."""

    lr: Callable[[Run], float]  # peak
    batch_tokens: Callable[[Run], float]
    last_lr: Callable[[float], float]  # from the peak
    source: str
    fitted: str  # on which runs
    covers: Callable[[Run], bool]  # whether the run is among them


def _kaplan_lr(run: Run) -> float:
    lr = 0.003239 - 0.0001395 * math.log(run.params)
    return lr if run.params <= 1e10 else math.nan


RULES = {
    "deepseek": Rule(
        lambda run: 0.3118 * run.flops**-0.1250,
        lambda run: 0.2920 * run.flops**0.3271,
        lambda lr: 0.1 * lr,
        "DeepSeek LLM (2024), section 3.1: lr = 0.3118 C^-0.1250, batch = 0.2920 C^0.3271 tokens",
        "1e17 to 2e19 FLOP, and used by its authors up to 8e23",
        lambda run: 1e17 <= run.flops <= 8e23,
    ),
    "steplaw": Rule(
        lambda run: 1.79 * run.params**-0.713 * run.tokens**0.307,
        lambda run: 0.58 * run.tokens**0.571,
        lambda lr: min(lr, 1e-5),
        "Step Law (Li et al., 2025): lr = 1.79 N^-0.713 D^0.307, N without embeddings, batch = 0.58 D^0.571 tokens",
        "6e7 to 1e9 parameters, up to 1e11 tokens",
        lambda run: 6e7 <= run.params <= 1.1e9 and run.tokens <= 1e11,
    ),
    "kaplan": Rule(
        _kaplan_lr,
        lambda run: 2e8 * run.loss ** (-1 / 0.21),
        lambda lr: 0.0,
        "Kaplan et al. (2020): lr = 0.003239 - 0.0001395 ln N (equation D.1), N without embeddings; batch: the critical one, "
        "2e8 / L^(1/0.21) tokens (equation 1.4)",
        "768 to 1.5e9 parameters; no learning rate beyond 1e10",
        lambda run: 768 <= run.params <= 1.5e9,
    ),
}
"""Three rules by name. DeepSeek's is the usual one here: of the three it alone has been followed at 1e23 to 1e24 FLOP, and its
small exponents move least where it is taken beyond its runs. Step Law knows parameters and tokens apart, which matters for
a model that is far from the best size for its budget."""
