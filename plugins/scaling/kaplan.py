"""The power laws of Kaplan et al. (2020): the loss without a floor, limited by size, data or compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nanopre import UserError, hookimpl
from nanopre.planning import report
from nanopre.planning.fitting import DELTA, fit_log_loss, fit_power, need_determined
from nanopre.planning.laws import Allocation
from nanopre.planning.runs import Runs


@dataclass
class KaplanLaw:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (equation 1.5), and the laws of each limit alone.

    What the runs do not tell is nan.
    """

    N_c: float
    alpha_N: float
    D_c: float
    alpha_D: float
    size_c: float  # L(N) = (size_c / N)^size_alpha, of models that lack no data (equation 1.1)
    size_alpha: float
    data_c: float  # L(D) = (data_c / D)^data_alpha, of models that are large enough (1.2)
    data_alpha: float
    compute_c: float  # L(C) = (compute_c / C)^compute_alpha, of the best use of compute (1.3)
    compute_alpha: float
    B_star: float = math.nan  # critical batch size, tokens: B_star / L^(1/alpha_B) (1.4)
    alpha_B: float = math.nan

    def predict(self, params: float, tokens: float) -> float:
        return ((self.N_c / params) ** (self.alpha_N / self.alpha_D) + self.D_c / tokens) ** self.alpha_D

    def allocate(self, flops: float) -> Allocation:
        """Where the derivative of L(N, C / 6N) by N is zero."""
        p = self.alpha_N / self.alpha_D
        params = (p * self.N_c**p * flops / (6 * self.D_c)) ** (1 / (p + 1))
        tokens = flops / (6 * params)
        return Allocation(params, tokens, self.predict(params, tokens))

    def critical_batch(self, loss: float) -> float:
        """Tokens a step at which twice the least steps and twice the least tokens are needed (section 5.1)."""
        return self.B_star / loss ** (1 / self.alpha_B)


@dataclass
class Kaplan:
    """Power laws L(N), L(D), L(C), L(N, D) and the critical batch size (Kaplan et al., 2020)."""

    embeddings: bool = True  # whether N counts them; false, as in the paper, needs their number

    law = KaplanLaw

    @property
    def definition(self) -> str:
        counted = "params as the runs give them" if self.embeddings else "params less embedding_params; flops = 6 N D of these"
        return (
            f"N: {counted}; C = 6 N D; L(N, D) by the least SUM of Huber({DELTA:g}) terms of the log-loss on all points; L(N), "
            "L(D), L(C) by least squares of logarithms on the lowest loss of each size, number of tokens, and at each cost"
        )

    def fit(self, runs):
        return self._fit(runs, None)

    def refit(self, runs, law):
        return self._fit(runs, law)

    def _fit(self, runs: Runs, near: KaplanLaw | None) -> KaplanLaw:
        runs = self.counted(runs)
        joint, _ = _joint(runs, near)
        alone = []
        points = {"params": _lowest(runs, runs.params), "tokens": _lowest(runs, runs.tokens), "flops": _front(runs)}
        for column, best in points.items():
            alone += _falling_power(getattr(runs, column)[best], runs.loss[best])
        return KaplanLaw(*joint, *alone, *_critical_batch(runs))

    def counted(self, runs: Runs) -> Runs:
        """The runs with N as it is counted here."""
        return runs if self.embeddings else runs.without_embeddings()

    def notes(self, runs, law):
        found = []
        try:
            objectives = {embeddings: _joint(Kaplan(embeddings).counted(runs), None)[1] for embeddings in (True, False)}
            better = "with" if objectives[True] < objectives[False] else "without"
            found.append(
                f"N {better} embeddings fits better: objective {objectives[True]:.4e} with, {objectives[False]:.4e} without"
            )
        except UserError as error:
            found.append(f"with or without embeddings: {error}")
        if math.isnan(law.B_star):
            found.append("critical batch size: needs curves of one size with at least 3 values of batch_size (tokens a step)")
        return found + self._shape(self.counted(runs), law)

    def _shape(self, runs: Runs, law: KaplanLaw) -> list[str]:
        """The loss against the aspect ratio d_model / n_layers at equal N and D: what it is beside that of the law."""
        ratio = np.log(runs.d_model / runs.n_layers)
        known = np.isfinite(ratio)
        if len(np.unique(ratio[known])) < 4:
            return ["shape: needs d_model and n_layers, in at least 4 ratios"]
        excess = np.log(runs.loss / law.predict(runs.params, runs.tokens))[known]
        bend, slope, level = np.polyfit(ratio[known], excess, 2)
        low, high = np.exp(ratio[known].min()), np.exp(ratio[known].max())
        best = math.exp(-slope / (2 * bend)) if bend > 0 else math.nan
        if low < best < high:
            price = math.expm1(bend * math.log(4) ** 2)
            return [
                f"shape: at equal N and D, d_model / n_layers = {best:.0f} is the best of {low:.0f} to {high:.0f}; a ratio "
                f"4 times off costs {price:.2%} of the loss"
            ]
        at_ends = np.polyval([bend, slope, level], np.log([low, high]))
        return [
            f"shape: at equal N and D, no best d_model / n_layers within {low:.0f} to {high:.0f}; between these ends the loss "
            f"changes by {math.expm1(at_ends[1] - at_ends[0]):+.2%}"
        ]

    def draw(self, figure, runs, fit):
        runs = self.counted(runs)
        contours, residuals = figure.subplots(1, 2)
        report.draw_contours(contours, runs, fit)
        report.draw_residuals(residuals, runs, fit.law.predict(runs.params, runs.tokens))


def _joint(runs: Runs, near: KaplanLaw | None) -> tuple[list[float], float]:
    """([N_c, alpha_N, D_c, alpha_D], objective) of L(N, D)."""
    runs.need(4, 2, "Kaplan's law")
    runs.need_spread("tokens", "Kaplan's law")
    n, d, log_loss = np.log(runs.params), np.log(runs.tokens), np.log(runs.loss)

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n_c, d_c, log_alpha_n, log_alpha_d = (theta[:, i, None] for i in range(4))
        alpha_n, alpha_d = np.exp(log_alpha_n), np.exp(log_alpha_d)
        size, data = alpha_n / alpha_d * (n_c - n), d_c - d
        both = np.logaddexp(size, data)
        share = np.exp(size - both)
        slopes = [alpha_n * share, alpha_d * (1 - share), alpha_d * share * size, alpha_d * (both - share * size)]
        return alpha_d * both, np.stack(slopes, axis=-1)

    if near:
        starts = np.log([[near.N_c, near.D_c, near.alpha_N, near.alpha_D]])
    else:  # from each pair of exponents, with size and data as much to blame at the middle of the points
        alpha = np.stack(np.meshgrid(*[(0.03, 0.06, 0.12, 0.25, 0.5)] * 2), axis=-1).reshape(-1, 2)
        level = log_loss.mean() / alpha[:, 1:] - math.log(2)
        starts = np.hstack([n.mean() + level * alpha[:, 1:] / alpha[:, :1], d.mean() + level, np.log(alpha)])
    theta, objective = fit_log_loss(model, log_loss, starts)
    n_c, d_c, alpha_n, alpha_d = np.exp(np.minimum(theta, 700.0))
    need_determined("Kaplan's law", alpha_N=alpha_n, alpha_D=alpha_d)
    return [float(n_c), float(alpha_n), float(d_c), float(alpha_d)], objective


def _falling_power(x: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    """(constant, exponent) of loss = (constant / x)^exponent; nan where the points have no fall, or so little of one that
    the constant is beyond any number."""
    if len(np.unique(x)) < 2:
        return math.nan, math.nan
    at_one, exponent = fit_power(x, loss)
    falls = exponent < 0 and abs(math.log(at_one) / exponent) < 700
    return (math.exp(-math.log(at_one) / exponent), -exponent) if falls else (math.nan, math.nan)


def _lowest(runs: Runs, values: np.ndarray) -> np.ndarray:
    """The point of the lowest loss of each value."""
    order = np.lexsort([runs.loss, values])
    return order[np.unique(values[order], return_index=True)[1]]


def _front(runs: Runs) -> np.ndarray:
    """The points that none as cheap beats."""
    order = np.lexsort([runs.loss, runs.flops])
    lowest = np.minimum.accumulate(runs.loss[order])
    return order[np.r_[True, runs.loss[order][1:] < lowest[:-1]]]


def _critical_batch(runs: Runs) -> tuple[float, float]:
    """(B_star, alpha_B) from runs of one size with different batches, nan where there are none.

    To reach a loss with batches of B tokens takes E = E_min (1 + B / B_crit) tokens (McCandlish et al., 2018, equation
    2.11): a straight line at each loss that all of the curves pass, whose level and slope give B_crit.
    """
    losses, critical = [], []
    for size in np.unique(runs.params[np.isfinite(runs.batch_size)]):
        at_size = runs[(runs.params == size) & np.isfinite(runs.batch_size)]
        curves = [at_size[at_size.run == label] for label in np.unique(at_size.run)]
        curves = [curve[np.argsort(curve.tokens)] for curve in curves if len(curve) > 1]
        batch = np.array([curve.batch_size[0] for curve in curves])
        if len(np.unique(batch)) < 3:
            continue
        best = [np.minimum.accumulate(curve.loss) for curve in curves]
        low, high = max(loss[-1] for loss in best), min(loss[0] for loss in best)
        for level in np.geomspace(low, high, 12)[1:-1] if low < high else ():
            tokens = [
                math.exp(np.interp(-level, -loss, np.log(curve.tokens))) for loss, curve in zip(best, curves, strict=True)
            ]
            slope, least = np.polyfit(batch, tokens, 1)
            if slope > 0 and least > 0:
                losses.append(level)
                critical.append(least / slope)
    if len(losses) < 2:
        return math.nan, math.nan
    at_one, exponent = fit_power(np.array(losses), np.array(critical))
    return at_one, -1 / exponent


@hookimpl
def nanopre_analyzers(register):
    register("kaplan", Kaplan)
