"""Scaling laws: how the loss follows from parameters and tokens, and how a budget is best spent. The published ones.

A law is a dataclass whose fields are its estimates, all of them numbers, so that it can be printed, written to JSON and
read back. C is FLOPs, N parameters, D tokens; the loss is in nats a token. C = 6 N D, as in the sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np


class Allocation(NamedTuple):
    """How a law spends a budget. Numbers or arrays, as the budget is."""

    params: float
    tokens: float
    loss: float  # nan where the law has none


class Law(Protocol):
    """What an analyzer's `fit` gives: a dataclass whose fields are the estimates."""

    def allocate(self, flops: float) -> Allocation:
        """The best parameters and tokens for a budget, and the loss that they reach."""

    def predict(self, params: float, tokens: float) -> float:
        """The loss of a model of `params` trained on `tokens`; only of laws that know more than the best models."""


@dataclass
class Frontier:
    """The best models alone: N = params_at_1e18 (C/1e18)^params_exponent, D likewise, and the loss that they reach,
    loss_floor + loss_at_1e18 (C/1e18)^-loss_exponent."""

    params_at_1e18: float
    params_exponent: float  # a
    tokens_at_1e18: float
    tokens_exponent: float  # b; a + b = 1 where C = 6 N D
    loss_floor: float = math.nan
    loss_at_1e18: float = math.nan  # above the floor
    loss_exponent: float = math.nan

    def allocate(self, flops: float) -> Allocation:
        c = flops / 1e18
        return Allocation(
            self.params_at_1e18 * c**self.params_exponent,
            self.tokens_at_1e18 * c**self.tokens_exponent,
            self.loss_floor + self.loss_at_1e18 * c**-self.loss_exponent,
        )


@dataclass
class Additive:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, equation 10)."""

    A: float
    B: float
    E: float  # the entropy of text
    alpha: float
    beta: float

    def predict(self, params: float, tokens: float) -> float:
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def allocate(self, flops: float) -> Allocation:
        """The closed form of equation 4: N = G (C/6)^a, D = (C/6)^b / G, a = beta / (alpha + beta), b = 1 - a."""
        g = self.params_by_tokens()
        params = g * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        tokens = (flops / 6) ** (self.alpha / (self.alpha + self.beta)) / g
        return Allocation(params, tokens, self.predict(params, tokens))

    def params_by_tokens(self) -> float:
        """G: the best N is G^2 D at the budget where both terms' exponents weigh the same, C = 6."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def best_params(self, tokens: float) -> float:
        """The parameters for which so many tokens are the best number."""
        g = self.params_by_tokens()
        return g * (g * tokens) ** (self.beta / self.alpha)

    def best_tokens(self, params: float) -> float:
        """The tokens for which so many parameters are the best number."""
        g = self.params_by_tokens()
        return (params / g) ** (self.alpha / self.beta) / g

    def tokens_for(self, params: float, loss: float) -> float:
        """The tokens after which a model of `params` reaches the loss; inf where it never does."""
        left = np.maximum(loss - self.E - self.A / params**self.alpha, 0.0)
        with np.errstate(divide="ignore"):
            return (self.B / left) ** (1 / self.beta)


@dataclass
class InferenceAware(Additive):
    """The additive law, where a budget pays for training and for a lifetime of inference: C = 6 N D + 2 N T (Sardana et
    al., 2023, equation 2)."""

    inference_tokens: float = 0.0  # T, read and written by the model when it is used

    def allocate(self, flops: float) -> Allocation:
        """flops: of training and inference together."""

        def loss(log_params: np.ndarray) -> np.ndarray:
            params = np.exp(log_params)
            return self.predict(params, self._tokens(params, flops))

        largest = np.log(flops / (2 * self.inference_tokens + 6))  # a model that has a token left to learn from
        params = np.exp(_minimum(loss, largest - 40, largest))
        tokens = self._tokens(params, flops)
        return Allocation(params, tokens, self.predict(params, tokens))

    def _tokens(self, params: float, flops: float) -> float:
        return np.maximum(flops / (6 * params) - self.inference_tokens / 3, 1.0)

    def cost(self, params: float, tokens: float) -> float:
        """FLOPs of training and inference together."""
        return 6 * params * tokens + 2 * params * self.inference_tokens

    def cheapest(self, loss: float) -> Allocation:
        """The model that reaches the loss with the least cost of training and inference."""
        smallest = np.log(self.A / (loss - self.E)) / self.alpha  # reaches the loss after infinitely many tokens
        training = Additive(self.A, self.B, self.E, self.alpha, self.beta)

        def cost(log_params: np.ndarray) -> np.ndarray:
            return np.log(self.cost(np.exp(log_params), training.tokens_for(np.exp(log_params), loss)))

        params = np.exp(_minimum(cost, smallest + 1e-6, smallest + 20))
        return Allocation(params, self.tokens_for(params, loss), loss)


@dataclass
class DataConstrained(Additive):
    """The additive law of effective parameters and tokens, where data is repeated (Muennighoff et al., 2023, equations 5
    and 6): of U unique tokens, R = D/U - 1 repetitions are worth U R_D (1 - exp(-R/R_D)) more; parameters beyond those
    that U tokens are best for likewise, with R_N."""

    R_D: float = 15.3878
    R_N: float = 5.3097
    unique_tokens: float = 0.0  # U of the run that is planned; 0: as many as it wants

    def predict(self, params: float, tokens: float, unique_tokens: float | None = None) -> float:
        unique = self.unique_tokens if unique_tokens is None else unique_tokens
        unique = np.minimum(np.where(np.asarray(unique) > 0, unique, np.inf), tokens)
        enough = np.minimum(self.best_params(unique), params)
        return super().predict(_effective(params, enough, self.R_N), _effective(tokens, unique, self.R_D))

    def allocate(self, flops: float) -> Allocation:
        free = super().allocate(flops)
        if not self.unique_tokens:
            return free

        def loss(log_params: np.ndarray) -> np.ndarray:
            params = np.exp(log_params)
            return self.predict(params, flops / (6 * params))

        middle = np.log(free.params)
        params = np.exp(_minimum(loss, middle - 7, middle + 7))
        return Allocation(params, flops / (6 * params), loss(np.log(params)))


def _effective(amount: float, unique: float, half_life: float) -> float:
    """What an amount is worth of which `unique` is new and the rest repeats it."""
    return unique + unique * half_life * -np.expm1(-(amount / unique - 1) / half_life)


def _minimum(function, low: float, high: float) -> float:
    """Where a function of arrays with one valley is least, to 1e-9: the ends draw in around the best of 65 points."""
    low, high = np.asarray(low, float), np.asarray(high, float)
    while np.max(high - low) > 1e-9:
        x = np.linspace(low, high, 65)
        best = np.argmin(function(x), axis=0)
        low, high = (np.take_along_axis(x, np.clip(best + k, 0, 64)[None], 0)[0] for k in (-1, 1))
    return (low + high) / 2


@dataclass
class Table:
    """The best models of a published table, on straight lines between its rows in logarithms, and beyond its ends."""

    flops: tuple[float, ...]
    params: tuple[float, ...]
    tokens: tuple[float, ...]

    def allocate(self, flops: float) -> Allocation:
        def between(column: tuple[float, ...]) -> float:
            x, y = np.log(self.flops), np.log(column)
            row = np.clip(np.searchsorted(x, np.log(flops)) - 1, 0, len(x) - 2)
            return np.exp(y[row] + (np.log(flops) - x[row]) * (y[row + 1] - y[row]) / (x[row + 1] - x[row]))

        return Allocation(between(self.params), between(self.tokens), flops * math.nan)


CHINCHILLA = "N: all parameters, embeddings among them; C = 6 N D; loss on MassiveText, 32k tokens"

PUBLISHED: dict[str, tuple[Law, str]] = {
    "chinchilla-1": (
        Table(
            flops=(1.92e19, 1.21e20, 1.23e22, 5.76e23, 3.85e24, 9.90e24, 3.43e25, 1.27e26, 1.30e28),
            params=(400e6, 1e9, 10e9, 67e9, 175e9, 280e9, 520e9, 1e12, 10e12),
            tokens=(8.0e9, 20.2e9, 205.1e9, 1.5e12, 3.7e12, 5.9e12, 11.0e12, 21.2e12, 216.2e12),
        ),
        f"the envelope of training curves, Hoffmann et al. (2022), table 3; {CHINCHILLA}",
    ),
    # The exponents as printed, 0.34 and 0.28, move the best model at 5.76e23 FLOPs from 40B to 32B: these are unrounded.
    "chinchilla-3": (
        Additive(math.exp(6.0073404), math.exp(6.0179186), math.exp(0.5267228), 0.33917084, 0.2849083),
        f"the parametric fit, unrounded, Hoffmann et al. (2022), equation 10; {CHINCHILLA}",
    ),
    "besiroglu": (
        Additive(482.01, 2085.43, 1.8172, 0.3478, 0.3658),
        f"the parametric fit anew, Besiroglu et al. (2024), equation 4; {CHINCHILLA}",
    ),
    "muennighoff": (  # unrounded, as in the authors' code
        DataConstrained(
            math.exp(6.255414), math.exp(7.3049974), math.exp(0.6254804), 0.3526596, 0.3526596, 15.387756, 5.309743
        ),
        "repeated data, Muennighoff et al. (2023), appendix A; N: all parameters; C = 6 N D; loss on C4, GPT-2's 50k tokens",
    ),
}
"""Published laws by name, each with its definition."""
