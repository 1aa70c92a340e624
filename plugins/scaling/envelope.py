"""Approach 1 of Hoffmann et al. (2022): of all training curves, which model is the best at each FLOP count?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from nanopre import UserError, hookimpl
from nanopre.planning import report
from nanopre.planning.fitting import fit_frontier
from nanopre.planning.laws import Frontier
from nanopre.planning.runs import Runs


@dataclass
class Envelope:
    """Power laws through the lower envelope of all training curves (Hoffmann et al., 2022, section 3.1)."""

    method: Literal["hull", "binned"] = "hull"  # what the envelope is: it moves the exponent by several hundredths
    bins: int = 50  # binned: at how many FLOP counts, equally far apart in logarithms

    law = Frontier

    def __post_init__(self):
        if self.bins < 2:
            raise ValueError(f"bins = {self.bins} must be at least 2")

    @property
    def definition(self) -> str:
        envelope = {
            "hull": "the falling part of the lower convex hull of all points in log C, log L; nothing between points is used",
            "binned": f"the lowest curve at each of {self.bins} FLOP counts, straight in log C, log L between its points",
        }
        return (
            f"N: params, C: flops as the runs give them, else 6 N D; envelope: {envelope[self.method]}; power laws by least "
            "squares of logarithms"
        )

    def fit(self, runs):
        best = self.best(runs)
        if len(np.unique(best.params)) < 2:
            raise UserError("the envelope needs models of at least 2 sizes on it; one size is the best at every cost.")
        return fit_frontier(best.flops, best.params, best.tokens, best.loss)

    def best(self, runs: Runs) -> Runs:
        """The points of the envelope, by rising FLOPs."""
        runs.need(3, 2, "the envelope")
        return _hull(runs) if self.method == "hull" else _binned(runs, self.bins)

    def notes(self, runs, law):
        best = self.best(runs)
        return [
            f"{len(best)} points on the envelope, of {len(np.unique(best.params))} sizes, from {best.flops.min():.3g} to "
            f"{best.flops.max():.3g} FLOPs"
        ]

    def draw(self, figure, runs, fit):
        loss, size = figure.subplots(1, 2)
        best = self.best(runs)
        report.draw_curves(loss, runs)
        loss.plot(best.flops, best.loss, "o", color="black", ms=4, zorder=3, label=f"envelope ({self.method})")
        report.draw_law(loss, fit, np.array([best.flops.min(), 10 * best.flops.max()]), "loss", "law, a decade beyond")
        loss.legend(frameon=False, fontsize=8)
        report.draw_best(size, fit, best.flops, best.params, "models on the envelope")


def _hull(runs: Runs) -> Runs:
    from scipy.spatial import ConvexHull, QhullError  # here: train.py loads every plugin, and needs no scipy

    try:
        hull = ConvexHull(np.stack([np.log(runs.flops), np.log(runs.loss)], axis=1))
    except QhullError:
        raise UserError("the envelope needs points that are not all on one line of log C and log L.") from None
    left, down = hull.equations[:, :2].T
    # Edges whose outer side looks down and to the left: the falling part. One that falls faster than 1 / C is no envelope:
    # it joins models of one budget whose FLOPs differ by the rounding of a step.
    below = (left < 0) & (down < left)
    best = np.unique(hull.simplices[below])
    return runs[best[np.argsort(runs.flops[best])]]


def _binned(runs: Runs, bins: int) -> Runs:
    if len(np.unique(runs.run)) == len(runs):
        raise UserError("the binned envelope needs training curves, points that share a run; the hull does not.")
    grid = np.geomspace(runs.flops.min(), runs.flops.max(), bins)
    curves = [runs.cut(label, grid) for label in np.unique(runs.run)]
    losses = np.array([curve.loss for curve in curves])
    lowest = np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=0)
    some = ~np.isnan(losses).all(axis=0)  # no curve may reach a FLOP count between two runs of one point
    columns = {
        name: np.array([getattr(curves[i], name)[at] for at, i in enumerate(lowest)])[some]
        for name in ("params", "tokens", "loss", "flops", "run")
    }
    return Runs(**columns)


@hookimpl
def nanopre_analyzers(register):
    register("envelope", Envelope)
