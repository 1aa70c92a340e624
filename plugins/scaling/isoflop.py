"""Approach 2 of Hoffmann et al. (2022): at each of a few budgets, a parabola through models of many sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nanopre import UserError, hookimpl
from nanopre.planning import report
from nanopre.planning.fitting import fit_additive, fit_frontier
from nanopre.planning.laws import Frontier
from nanopre.planning.runs import Runs


class Valley(NamedTuple):
    """A budget's parabola of the loss in log N, and its minimum."""

    runs: Runs  # the points of the budget
    parabola: np.ndarray  # coefficients of log N, the square's first
    flops: float
    params: float
    tokens: float
    loss: float


@dataclass
class IsoFlop:
    """Power laws through the minima of parabolas in log N, one for each budget (Hoffmann et al., 2022, section 3.2)."""

    budgets: list[float] = field(default_factory=list)  # FLOPs at which curves are cut; none: points of like FLOPs are one
    tolerance: float = 0.1  # points of one budget are at most so far from the next, as a part of their FLOPs

    law = Frontier
    definition = (
        "N: params as the runs give them; C: flops as the runs give them, else 6 N D; the loss is a parabola of log N at each "
        "budget, by least squares; power laws through the minima by least squares of logarithms"
    )

    def __post_init__(self):
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance = {self.tolerance} must be above 0 and below 1")
        if any(not 0 < budget < np.inf for budget in self.budgets):
            raise ValueError(f"budgets = {self.budgets} must be above 0")

    def fit(self, runs):
        valleys, left_out = self.valleys(runs)
        if len(valleys) < 2:
            raise UserError(
                f"isoflop needs at least 2 budgets, each with a minimum between 3 or more sizes; found {len(valleys)} "
                f"({'; '.join(left_out) or 'all points are one budget'}); --option isoflop.budgets=[...] cuts curves at FLOPs."
            )
        return _through(valleys)

    def valleys(self, runs: Runs) -> tuple[list[Valley], list[str]]:
        """(the budgets that can be used, by rising FLOPs; why others can't)."""
        valleys, left_out, scattered = [], [], 0
        for group in self.groups(runs):
            log_n = np.log(group.params)
            flops = float(np.exp(np.log(group.flops).mean()))
            if len(np.unique(group.params)) < 3:
                scattered += len(group)
                continue
            centre = log_n.mean()
            a, b, c = np.polyfit(log_n - centre, group.loss, 2)
            vertex = -b / (2 * a) + centre if a > 0 else np.nan
            if not log_n.min() < vertex < log_n.max():
                at = "has no minimum" if a <= 0 else f"its minimum, {np.exp(vertex):.3g}, lies beyond the sizes that were run"
                left_out.append(f"budget {flops:.3g}: {at}")
                continue
            parabola = np.array([a, b - 2 * a * centre, a * centre**2 - b * centre + c])
            tokens = float(np.exp(np.polyval(np.polyfit(log_n, np.log(group.tokens), 1), vertex)))
            loss = float(c - b**2 / (4 * a))
            valleys.append(Valley(group, parabola, flops, float(np.exp(vertex)), tokens, loss))
        if scattered:
            left_out.append(f"{scattered} points at budgets with fewer than 3 sizes")
        return valleys, left_out

    def groups(self, runs: Runs) -> list[Runs]:
        """The points of each budget."""
        if self.budgets:
            curves = [runs.cut(label, np.sort(self.budgets)) for label in np.unique(runs.run)]
            cuts = [[curve[np.array([i])] for curve in curves if np.isfinite(curve.loss[i])] for i in range(len(self.budgets))]
            return [Runs.concatenate(cut) for cut in cuts if cut]
        order = np.argsort(runs.flops)
        ends = np.flatnonzero(np.diff(np.log(runs.flops[order])) > np.log1p(self.tolerance)) + 1
        return [runs[part] for part in np.split(order, ends)]

    def notes(self, runs, law):
        valleys, left_out = self.valleys(runs)
        lines = [f"left out: {reason}" for reason in left_out]
        minima = ", ".join(f"{v.flops:.3g} (N {v.params:.3g}, loss {v.loss:.4f})" for v in valleys)
        lines.append(f"{len(valleys)} budgets: {minima}")
        return lines + self._bias(valleys)

    def _bias(self, valleys: list[Valley]) -> list[str]:
        """What parabolas make of a law that is known: theirs is not the shape of a valley that was sampled widely."""
        used = Runs.concatenate([valley.runs for valley in valleys])
        try:
            law, _ = fit_additive(used)
            used.loss = law.predict(used.params, used.tokens)
            again = IsoFlop(tolerance=self.tolerance).fit(used)  # without budgets: its curves are cut already
        except UserError:  # too few points for it
            return []
        exact = law.beta / (law.alpha + law.beta)
        return [
            f"bias of the parabola: on losses of an additive law at these same points it finds a = {again.params_exponent:.4f} "
            f"where {exact:.4f} is exact ({again.params_exponent - exact:+.4f}); the wider the sizes of a budget, the more"
        ]

    def draw(self, figure, runs, fit):
        valleys, _ = self.valleys(runs)
        loss, size = figure.subplots(1, 2)
        for i, valley in enumerate(valleys):
            colour = f"C{i % 10}"
            n = np.geomspace(valley.runs.params.min(), valley.runs.params.max(), 100)
            loss.plot(valley.runs.params, valley.runs.loss, "o", ms=4, color=colour)
            loss.plot(n, np.polyval(valley.parabola, np.log(n)), color=colour, lw=1.2, label=f"{report.number(valley.flops)}")
            loss.plot(valley.params, valley.loss, "*", ms=12, color=colour, mec="black", mew=0.6, zorder=3)
        loss.set(xscale="log", xlabel="N, parameters", ylabel="loss, nats a token", title="stars: minima of the parabolas")
        loss.legend(frameon=False, fontsize=8, ncols=2, title="C, FLOPs")
        best = np.array([[valley.flops, valley.params] for valley in valleys])
        report.draw_best(size, fit, *best.T, "minima of the parabolas")


def _through(valleys: list[Valley]) -> Frontier:
    flops, params, tokens, loss = np.array([valley[2:] for valley in valleys]).T
    return fit_frontier(flops, params, tokens, loss)


@hookimpl
def nanopre_analyzers(register):
    register("isoflop", IsoFlop)
