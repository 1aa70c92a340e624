"""What repeated data is worth: tokens that were seen before count for less, and so do parameters beyond their need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanopre import UserError, hookimpl
from nanopre.planning import report
from nanopre.planning.fitting import DELTA, fit_additive, fit_log_loss, huber
from nanopre.planning.laws import DataConstrained
from nanopre.planning.runs import Runs

LARGEST = np.log(1e6)  # of R_D and R_N: more epochs than any run has, so that none of them decays


@dataclass
class DataConstrainedFit:
    """The additive law of effective tokens and parameters, for repeated epochs (Muennighoff et al., 2023, section 3)."""

    unique_tokens: float = 0.0  # that there are for the planned run; 0: as many as it wants

    law = DataConstrained
    definition = (
        "N: params as the runs give them; C = 6 N D; D: all tokens, of which unique_tokens are new; first A, B, E, alpha and "
        f"beta from runs that repeat nothing, then R_D and R_N from all: least SUM of Huber({DELTA:g}) terms of the log-loss"
    )

    def __post_init__(self):
        if not 0 <= self.unique_tokens < np.inf:
            raise ValueError(f"unique_tokens = {self.unique_tokens} must be at least 0 and finite")

    def fit(self, runs):
        # Rates of decay in epochs: from hardly any use of a repetition to one that is nearly as good as new.
        return self._fit(runs, None, np.log([[d, n] for d in (2.0, 10.0, 50.0) for n in (2.0, 10.0, 50.0)]))

    def refit(self, runs, law):
        return self._fit(runs, law, np.log([[law.R_D, law.R_N]]))

    def _fit(self, runs: Runs, near: DataConstrained | None, starts: np.ndarray) -> DataConstrained:
        once = _once(runs)
        if once.all():
            raise UserError("data_constrained needs runs that repeat data (unique_tokens below tokens); there is none.")
        try:
            base, _ = fit_additive(runs[once], near)
        except UserError as error:
            raise UserError(f"data_constrained: of the runs that repeat no data: {error}") from None
        enough = np.minimum(base.best_params(runs.unique_tokens), runs.params)

        def model(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rate = np.exp(np.clip(theta, -LARGEST, LARGEST))
            tokens, more_tokens = _effective(runs.tokens, runs.unique_tokens, rate[:, :1])
            params, more_params = _effective(runs.params, enough, rate[:, 1:])
            loss = base.predict(params, tokens)
            of_tokens = -base.beta * base.B / tokens ** (base.beta + 1) * more_tokens / loss
            of_params = -base.alpha * base.A / params ** (base.alpha + 1) * more_params / loss
            return np.log(loss), np.stack([of_tokens, of_params], axis=-1)

        rates, _ = fit_log_loss(model, np.log(runs.loss), starts)
        r_d, r_n = np.exp(np.clip(rates, -LARGEST, LARGEST)).tolist()
        return DataConstrained(**{**vars(base), "R_D": r_d, "R_N": r_n, "unique_tokens": self.unique_tokens})

    def notes(self, runs, law):
        residuals = np.log(law.predict(runs.params, runs.tokens, runs.unique_tokens) / runs.loss)
        found = [f"objective {huber(residuals):.6e} on {len(runs)} points, of which {_once(runs).sum()} repeat no data"]
        for name, value, what in (("R_D", law.R_D, "repeated tokens"), ("R_N", law.R_N, "parameters beyond their need")):
            if value > 1000:
                found.append(f"{name} = {value:.3g}: in these runs {what} are worth as much as others")
        return found

    def draw(self, figure, runs, fit):
        contours, residuals = figure.subplots(1, 2)
        report.draw_contours(contours, runs, fit)
        report.draw_residuals(residuals, runs, fit.law.predict(runs.params, runs.tokens, runs.unique_tokens))


def _once(runs: Runs) -> np.ndarray:
    return runs.tokens <= runs.unique_tokens * (1 + 1e-6)


def _effective(amount: np.ndarray, unique: np.ndarray, rate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what the amount is worth, as of nanopre.planning.laws.DataConstrained; its derivative by the logarithm of the rate)."""
    repeats = amount / unique - 1
    left = np.exp(-repeats / rate)
    return unique * (1 - rate * np.expm1(-repeats / rate)), unique * (rate * (1 - left) - repeats * left)


@hookimpl
def nanopre_analyzers(register):
    register("data_constrained", DataConstrainedFit)
