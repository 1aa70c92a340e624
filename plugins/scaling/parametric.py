"""Approach 3 of Hoffmann et al. (2022): one formula for the loss of every model, fitted to all points at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanopre import hookimpl
from nanopre.planning import report
from nanopre.planning.fitting import DELTA, fit_additive, huber
from nanopre.planning.laws import Additive


@dataclass
class Parametric:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al., 2022, section 3.3)."""

    law = Additive
    definition = (
        f"N: params as the runs give them; C = 6 N D; least SUM of Huber({DELTA:g}) terms of the log-loss"
    )

    def fit(self, runs):
        return fit_additive(runs)[0]

    def refit(self, runs, law):
        return fit_additive(runs, start=law)[0]

    def notes(self, runs, law):
        residuals = np.log(law.predict(runs.params, runs.tokens) / runs.loss)
        return [
            f"objective {huber(residuals):.6e} on {len(runs)} points; half of them within {np.median(np.abs(residuals)):.2%} "
            "of their loss",
            f"the best N grows as C^{law.beta / (law.alpha + law.beta):.4f}",
        ]

    def draw(self, figure, runs, fit):
        contours, residuals = figure.subplots(1, 2)
        report.draw_contours(contours, runs, fit)
        report.draw_residuals(residuals, runs, fit.law.predict(runs.params, runs.tokens))


@hookimpl
def nanopre_analyzers(register):
    register("parametric", Parametric)
