"""From a compute budget to parameters, tokens and loss: a law's answer, how sure it is, and what limits it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from nanopre import UserError
from nanopre.planning.laws import PUBLISHED, Additive, Allocation, DataConstrained, InferenceAware, Law
from nanopre.planning.scaling import Fit

SMALLEST, MIDDLE, LARGEST = 1.4e18, 8.3e19, 1.3e22
"""FLOPs, the middle being their geometric mean, of the 245 runs in figure 4 of Hoffmann et al. (2022), as Besiroglu et al.
(2024) read them off it."""

MOST = 1e35
"""FLOPs: seven centuries of the world's electricity (1e20 J a year) on H100s. Beyond, the search for a shape takes minutes."""


class Exponent(NamedTuple):
    """A published interval of a, in N ~ C^a."""

    low: float
    estimate: float
    high: float
    words: str


EXPONENTS = {
    "chinchilla-1": Exponent(
        0.488, 0.498, 0.502, "10th to 90th percentile of a in N ~ C^a, 0.488 to 0.502 (Hoffmann et al., 2022, table 2)"
    ),
    "besiroglu": Exponent(
        0.5126 - 1.96 * 0.02, 0.5126, 0.5126 + 1.96 * 0.02, "95%, by the published standard error 0.02 of a in N ~ C^a"
    ),
}  # fmt: skip
NO_INTERVAL = {
    "chinchilla-3": "none; the published one of a in N ~ C^a, 0.454 to 0.455, leaves out the estimate itself, 0.457, "
    "and would take 600,000 runs (Besiroglu et al., 2024)",
}


@dataclass
class Sized:
    """What a law makes of a budget."""

    flops: float  # the budget
    best: Allocation  # for training alone, with as many tokens as it wants
    chosen: Allocation  # with what inference and limited data change
    intervals: dict[str, tuple[float, float]]  # of the chosen "params", "tokens" and "loss", where they are known
    words: str  # which kind of interval it is, or why there is none
    runs_flops: tuple[float, float]  # of the smallest and largest run of the fit; (0, inf) where that is not known
    inference_tokens: float  # 0: not asked for
    tokens_available: float  # inf: not asked for
    worth: float  # the part of the budget that, without limits to the tokens, would reach the same loss

    @property
    def training_flops(self) -> float:
        return 6 * self.chosen.params * self.chosen.tokens

    @property
    def epochs(self) -> float:
        """How often each available token is seen; at most 1 where there are enough."""
        return self.chosen.tokens / self.tokens_available

    def lifetime_flops(self, a: Allocation) -> float:
        """Of training and inference."""
        return 6 * a.params * a.tokens + 2 * a.params * self.inference_tokens


def size(fit: Fit, flops: float, inference_tokens: float = 0.0, tokens_available: float = math.inf) -> Sized:
    """Parameters, tokens and loss for a budget, with intervals where they are known.

    inference_tokens: the model is used on so many: see `allocate`.
    tokens_available: so many different ones; inf: as many as there are by the law, or as it wants.
    Raises UserError for a law that can't answer, for more than MOST FLOPs, and for too few tokens where inference wants more.
    """
    if not flops <= MOST:
        raise UserError(f"a budget of {flops:.3g} FLOP: must be at most {MOST:g}.")
    if isinstance(fit.law, InferenceAware) and (inference_tokens or math.isfinite(tokens_available)):
        flag = "--inference-tokens" if inference_tokens else "--tokens-available"
        paid = short(fit.law.inference_tokens)
        raise UserError(f"{flag}: the budget of --law pays for {paid} tokens of inference; leave it out.")
    if isinstance(fit.law, DataConstrained) and fit.law.unique_tokens:  # a limit is one, wherever it is said
        tokens_available = min(tokens_available, fit.law.unique_tokens)
        unlimited = [dataclasses.replace(law, unique_tokens=0.0) for law in (fit.law, *fit.samples)]
        fit = dataclasses.replace(fit, law=unlimited[0], samples=unlimited[1:])

    def chosen(law: Law) -> Allocation:
        return Allocation(*map(float, allocate(law, flops, inference_tokens, tokens_available)))

    free = Allocation(*map(float, fit.law.allocate(flops)))
    if 2 * free.params * inference_tokens > MOST:
        raise UserError(f"--inference-tokens {inference_tokens:g}: must be at most {MOST / (2 * free.params):.3g} here.")
    point = chosen(fit.law)
    if inference_tokens and point.tokens > tokens_available:
        raise UserError(
            f"--tokens-available: {short(tokens_available)} are fewer than the {short(point.tokens)} that --inference-tokens "
            "asks for, and no law covers both; leave one of the two out."
        )
    intervals, words = {}, NO_INTERVAL.get(fit.name, "none is published")
    if fit.samples:
        ends = zip(*fit.interval(lambda law: np.array(chosen(law))), strict=True)
        pairs = {name: (float(low), float(high)) for name, (low, high) in zip(Allocation._fields, ends, strict=True)}
        intervals = {name: pair for name, pair in pairs.items() if all(map(math.isfinite, pair))}
        words = f"95%, of {len(fit.samples):,} resamples of the runs"
    elif fit.name in EXPONENTS:
        low, estimate, high, source = EXPONENTS[fit.name]
        words = f"{source}, turned about {MIDDLE:.1e} FLOP, the middle of the runs; of the loss none is published"
        if not inference_tokens and free.tokens <= tokens_available:
            ends = [free.params * (flops / MIDDLE) ** (a - estimate) for a in (low, high)]
            intervals["params"] = min(ends), max(ends)
            intervals["tokens"] = flops / (6 * max(ends)), flops / (6 * min(ends))
        else:
            words = "none is published with such a limit"
    elif fit.name not in PUBLISHED:
        words = "none, the law was fitted without a bootstrap"

    worth = 1.0
    if point.tokens > tokens_available:
        rate = fit.law.alpha * fit.law.beta / (fit.law.alpha + fit.law.beta)  # the best loss is E + a number x C^-rate
        worth = ((point.loss - fit.law.E) / (free.loss - fit.law.E)) ** (-1 / rate)
    runs = (SMALLEST, LARGEST) if fit.name in ("chinchilla-1", "chinchilla-3", "besiroglu") else (0.0, math.inf)
    return Sized(flops, free, point, intervals, words, runs, inference_tokens, tokens_available, worth)


def allocate(law: Law, flops: float, inference_tokens: float = 0.0, tokens_available: float = math.inf) -> Allocation:
    """How to spend a budget.

    With inference_tokens: the model that reaches the loss of the budget's best one at the least cost of training and
    inference together (Sardana et al., 2023); its training alone takes more than the budget. With fewer tokens_available
    than the best model wants: the best one on repeated tokens (Muennighoff et al., 2023), their R_D and R_N with a law that
    has none of its own.
    """
    free = law.allocate(flops)
    if not inference_tokens and free.tokens <= tokens_available:
        return free
    if not isinstance(law, Additive):
        flag = "--inference-tokens" if inference_tokens else f"--tokens-available, below the {short(free.tokens)} of the budget"
        raise UserError(f"{flag}: needs a law of the form E + A/N^alpha + B/D^beta, which --law is not; besiroglu is one.")
    terms = law.A, law.B, law.E, law.alpha, law.beta
    if inference_tokens:
        return InferenceAware(*terms, inference_tokens=inference_tokens).cheapest(free.loss)
    half_lives = (law.R_D, law.R_N) if isinstance(law, DataConstrained) else ()
    return DataConstrained(*terms, *half_lives, unique_tokens=tokens_available).allocate(flops)


def flops_for(law: Law, params: float) -> float:
    """The budget for which so many parameters are the best number. Raises UserError where none from 1 to MOST FLOPs is."""
    least, most = (float(law.allocate(flops).params) for flops in (1.0, MOST))
    if not least < params < most:
        bounds = f"between {least:.3g} and {most:.3g}, the best for 1 and for {MOST:g} FLOP"
        raise UserError(f"--params {params:g}: must be {bounds}.")
    return math.exp(brentq(lambda log_flops: math.log(law.allocate(math.exp(log_flops)).params / params), 0.0, math.log(MOST)))


def short(number: float) -> str:
    """A number of parameters or tokens as people say it: 72.2B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{letter}" if number < 999.5 * unit else f"{number / unit:,.0f}{letter}"
    return f"{number:.3g}"
