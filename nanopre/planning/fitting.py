"""Fits of laws to runs: power laws through the best models, and robust fits of the loss in logarithms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nanopre import UserError
from nanopre.planning.laws import Additive, Frontier
from nanopre.planning.runs import Runs

DELTA = 1e-3  # residuals of the log-loss beyond it count by their size, not its square (Hoffmann et al., 2022, appendix D.3)

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From coefficients (S, P) to the log-loss of each point (S, n) and its derivatives (S, n, P)."""


def huber(residuals: np.ndarray) -> np.ndarray:
    """The SUM of the Huber terms over the last axis. Not the mean: it is so small that optimisers stop where they start."""
    size = np.abs(residuals)
    return np.where(size <= DELTA, 0.5 * size**2, DELTA * (size - 0.5 * DELTA)).sum(-1)


def fit_log_loss(model: Model, log_loss: np.ndarray, starts: np.ndarray, max_steps: int = 200) -> tuple[np.ndarray, float]:
    """(coefficients, objective): the least `huber` of the residuals of the log-loss that is reached from any of the starts.

    Newton's method on all starts (S, P) at once. The Huber function is a parabola within DELTA and a straight line
    beyond, so the exact curvature comes from the few points within, and may be singular; each start is steadied by a
    multiple of the curvature of reweighted least squares, which never is, and which shrinks as steps succeed.
    """

    def evaluate(theta: np.ndarray):
        with np.errstate(all="ignore"):
            predicted, slopes = model(theta)
            residuals = predicted - log_loss
            objective = huber(residuals)
        return np.where(np.isfinite(objective), objective, np.inf), residuals, slopes

    theta = np.array(starts, float)
    objective, residuals, slopes = evaluate(theta)
    damping = np.ones(len(theta))
    active = np.flatnonzero(np.isfinite(objective))
    for _ in range(max_steps):
        if not active.size:
            break
        r, J = residuals[active], slopes[active]
        transposed = J.swapaxes(-1, -2)
        gradient = (transposed @ np.clip(r, -DELTA, DELTA)[..., None])[..., 0]
        size = np.abs(r)
        steadier = damping[active, None] * np.minimum(1.0, DELTA / np.maximum(size, DELTA))
        curvature = transposed @ (((size <= DELTA) + steadier)[..., None] * J)
        scale = np.sqrt(np.maximum(np.einsum("sii->si", curvature), 1e-300))
        curvature = curvature / (scale[:, :, None] * scale[:, None, :]) + 1e-12 * np.eye(theta.shape[1])
        step = -np.linalg.solve(curvature, (gradient / scale)[..., None])[..., 0] / scale
        new, new_residuals, new_slopes = evaluate(theta[active] + step)
        better = new < objective[active]
        moved = active[better]
        expected = -(gradient * step).sum(-1)
        theta[moved] += step[better]
        objective[moved], residuals[moved], slopes[moved] = new[better], new_residuals[better], new_slopes[better]
        damping[active] *= np.where(better, 0.2, 5.0)
        damping = np.maximum(damping, 1e-9)
        done = (expected < 1e-14 * objective[active]) | (damping[active] > 1e12)
        active = active[~done]
    best = int(np.argmin(objective))
    return theta[best], float(objective[best])


def fit_additive(runs: Runs, start: Additive | None = None) -> tuple[Additive, float]:
    """(law, objective) of L = E + A / N^alpha + B / D^beta, from many starts, or from one that is near.

    The loss is the exponential of a log-sum-exp of a - alpha log N, b - beta log D and e (equation 12 of Hoffmann et al.,
    2022), with N and D divided by their geometric means, so that a and b do not move with the exponents.
    Raises UserError for fewer than 5 points, for one size or one number of tokens alone, and where these do not determine it.
    """
    runs.need(5, 2, "the additive law")
    runs.need_spread("tokens", "the additive law")
    log_n, log_d = np.log(runs.params), np.log(runs.tokens)
    centre_n, centre_d = log_n.mean(), log_d.mean()
    n, d = log_n - centre_n, log_d - centre_d

    def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b, e, alpha, beta = (theta[:, i, None] for i in range(5))
        terms = np.stack([a - alpha * n, b - beta * d, e + 0 * n])
        log_loss = np.logaddexp.reduce(terms)
        share = np.exp(terms - log_loss)
        return log_loss, np.stack([*share, -share[0] * n, -share[1] * d], axis=-1)

    if start:
        a, b = np.log(start.A) - start.alpha * centre_n, np.log(start.B) - start.beta * centre_d
        starts = np.array([[a, b, np.log(start.E), start.alpha, start.beta]])
    else:
        starts = _additive_starts(n, d, runs.loss)
        starts = starts[np.argsort(huber(model(starts)[0] - np.log(runs.loss)))[:32]]
    theta, objective = fit_log_loss(model, np.log(runs.loss), starts)
    a, b, e, alpha, beta = theta
    # What each term changes the loss by, as a share of it: one that changes nothing has any exponent.
    shares = model(theta[None])[1][0, :, :2].max(axis=0)
    changes = shares * np.abs([alpha * np.ptp(n), beta * np.ptp(d)])
    if changes.min() < 1e-4:
        unused = "sizes" if changes[0] < changes[1] else "tokens"
        raise UserError(f"the additive law is not determined by these runs: their loss does not depend on their {unused}.")
    need_determined("the additive law", alpha=alpha, beta=beta)
    law = Additive(np.exp(a + alpha * centre_n), np.exp(b + beta * centre_d), np.exp(e), alpha, beta)
    return Additive(**{name: float(value) for name, value in vars(law).items()}), objective


def need_determined(what: str, **exponents: float) -> None:
    """Raises UserError for exponents that no loss has: the best fit then lies at infinity, or all but there."""
    for name, value in exponents.items():
        if not 0.005 < value < 3:
            raise UserError(
                f"{what} is not determined by these runs (the best {name} is {value:.3g}); it needs sizes and tokens over a "
                "wider range, each size with few and with many tokens, or fewer points from the start of training."
            )


def _additive_starts(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """(S, 5): a grid of exponents, each with the A, B and E that least squares of the relative residuals gives."""
    alpha, beta = (x.reshape(-1, 1) for x in np.meshgrid(np.arange(0.05, 1.5, 0.1), np.arange(0.05, 1.5, 0.1)))
    columns = np.stack([np.exp(-alpha * n), np.exp(-beta * d), np.ones((len(alpha), len(n)))]) / loss
    products = np.einsum("isn,jsn->sij", columns, columns)
    ridge = 1e-9 * np.trace(products, axis1=1, axis2=2)[:, None, None] * np.eye(3)
    linear = np.linalg.solve(products + ridge, columns.sum(-1).T[..., None])[..., 0]
    return np.hstack([np.log(np.maximum(linear, 1e-2)), alpha, beta])  # each term must be positive


def fit_power(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(y at x = 1, exponent) of a power law, by least squares of the logarithms."""
    exponent, at_one = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(at_one)), float(exponent)


def fit_frontier(flops: np.ndarray, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Frontier:
    """Power laws through the best models of at least two budgets, and of their loss above a floor where there are three."""
    c = flops / 1e18
    floor = fit_power_above_floor(c, loss) if len(np.unique(c)) > 2 else (np.nan,) * 3
    return Frontier(*fit_power(c, params), *fit_power(c, tokens), *floor)


def fit_power_above_floor(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """(floor, coefficient, exponent) of y = floor + coefficient x^-exponent, none below zero, by least squares of y's
    relative residuals."""
    from scipy.optimize import minimize_scalar, nnls  # here: train.py loads every plugin, and needs no scipy

    def linear(exponent: float) -> tuple[np.ndarray, float]:
        return nnls(np.stack([1 / y, x**-exponent / y], axis=1), np.ones(len(y)))

    exponent = minimize_scalar(lambda e: linear(e)[1], bounds=(0.001, 2.0), method="bounded", options={"xatol": 1e-9}).x
    floor, coefficient = linear(exponent)[0]
    return float(floor), float(coefficient), float(exponent)
