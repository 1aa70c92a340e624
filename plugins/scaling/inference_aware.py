"""The model whose training and use together cost least: smaller, and trained for longer, than the best to train alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanopre import UserError, hookimpl
from nanopre.planning import report
from nanopre.planning.fitting import DELTA, fit_additive
from nanopre.planning.laws import InferenceAware


@dataclass
class InferenceAwareFit:
    """The additive law, where a budget pays for training and a lifetime of inference (Sardana et al., 2023, section 2)."""

    inference_tokens: float = 0.0  # that the model will read and write when it is used; must be given
    reference_params: float = 13e9  # the quality of the best model of this size to train alone is priced, to compare

    law = InferenceAware
    definition = (
        "N: params as the runs give them; C = 6 N D + 2 N T pays for training and for T tokens of inference, each at the "
        f"price of a forward pass; least SUM of Huber({DELTA:g}) terms of the log-loss"
    )

    def __post_init__(self):
        if not 0 <= self.inference_tokens < np.inf:
            raise ValueError(f"inference_tokens = {self.inference_tokens} must be at least 0 and finite")
        if not 0 < self.reference_params < np.inf:
            raise ValueError(f"reference_params = {self.reference_params} must be above 0 and finite")

    def fit(self, runs):
        if not self.inference_tokens:
            raise UserError("inference_aware needs the lifetime's tokens: --option inference_aware.inference_tokens=2e12.")
        return self._with_inference(fit_additive(runs)[0])

    def refit(self, runs, law):
        return self._with_inference(fit_additive(runs, start=law)[0])

    def _with_inference(self, law) -> InferenceAware:
        return InferenceAware(**vars(law), inference_tokens=self.inference_tokens)

    def notes(self, runs, law):
        tokens = law.best_tokens(self.reference_params)
        cheapest = law.cheapest(law.predict(self.reference_params, tokens))
        saving = 1 - law.cost(cheapest.params, cheapest.tokens) / law.cost(self.reference_params, tokens)
        return [
            f"{self.reference_params:.3g} parameters on {tokens:.3g} tokens are the best to train alone; their quality costs "
            f"least with {cheapest.params:.3g} on {cheapest.tokens:.3g}: {saving:.1%} less training and inference"
        ]

    def draw(self, figure, runs, fit):
        contours, residuals = figure.subplots(1, 2)
        report.draw_contours(contours, runs, fit)
        report.draw_residuals(residuals, runs, fit.law.predict(runs.params, runs.tokens))


@hookimpl
def nanopre_analyzers(register):
    register("inference_aware", InferenceAwareFit)
