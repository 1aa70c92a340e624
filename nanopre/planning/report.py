"""How fits are shown: tables of text, figures, and one HTML page with both. C is FLOPs, N parameters, D tokens."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from nanopre.planning.laws import Allocation, Law
from nanopre.planning.runs import Runs
from nanopre.planning.scaling import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FITTED = "#c0392b"  # what a law says, against the runs in colours of their size
SIZES = "viridis"


# Words and tables.


def number(value: float) -> str:
    """Four digits, in powers of ten where they are many; "-" for what is not known."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3e}".replace("e+", "e")


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return number(value) + (f"  [{number(interval[0])}, {number(interval[1])}]" if interval and math.isfinite(value) else "")


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join((indent + "  ".join(map(str.ljust, row, widths))).rstrip() for row in rows)


def describe_runs(runs: Runs) -> str:
    def span(values: np.ndarray) -> str:
        return f"{number(values.min())} to {number(values.max())}"

    return (
        f"{len(runs)} points of {len(np.unique(runs.run))} runs: N {span(runs.params)} ({len(np.unique(runs.params))} sizes), "
        f"D {span(runs.tokens)} tokens, C {span(runs.flops)} FLOPs, loss {span(runs.loss)} nats a token"
    )


def estimates(fit: Fit) -> list[tuple[str, str]]:
    """(name, estimate with its interval) of what the law knows."""
    return [
        (name, with_interval(value, fit.interval(lambda law, name=name: getattr(law, name))))
        for name, value in fit.estimates().items()
        if math.isfinite(value)
    ]


def resamples(fit: Fit) -> str:
    if not fit.samples:
        return "no bootstrap, so no intervals" if not fit.failed else f"none of {fit.failed} resamples could be fitted"
    failed = f", {fit.failed} more could not be fitted" if fit.failed else ""
    return f"in brackets: 95% intervals of {len(fit.samples)} resamples of the runs{failed}"


def budget(runs: Runs, flops: float) -> str:
    return f"best use of {number(flops)} FLOPs, {number(flops / runs.flops.max())} times the largest run's"


def allocation_words(fit: Fit, flops: float) -> dict[str, str]:
    """How the law spends a budget, each number with its interval."""
    best = fit.law.allocate(flops)
    values: dict[str, Callable[[Allocation], float]] = {
        "parameters": lambda a: a.params,
        "tokens": lambda a: a.tokens,
        "tokens a parameter": lambda a: a.tokens / a.params,
        "loss": lambda a: a.loss,
    }
    return {
        name: with_interval(value(best), fit.interval(lambda law, value=value: value(law.allocate(flops))))
        for name, value in values.items()
    }


def fit_text(fit: Fit, runs: Runs, flops: float | None) -> str:
    """What `plan.py fit` prints."""
    lines = [f"{fit.name}: {describe_runs(runs)}", f"  {fit.definition}", "", table(estimates(fit), "  "), ""]
    lines.append(f"  {resamples(fit)}")
    lines += [f"  {note}" for note in fit.notes]
    if flops:
        lines += ["", f"  {budget(runs, flops)}:", table(list(allocation_words(fit, flops).items()), "    ")]
    return "\n".join(lines)


COMPARED = ("parameters", "tokens", "tokens a parameter", "loss")


def comparison(fits: dict[str, Fit | str], flops: float) -> list[list[str]]:
    """A row a law: its name and its allocation, or why it could not be fitted."""
    rows = [["law", *COMPARED]]
    for name, fit in fits.items():
        rows.append([name, *allocation_words(fit, flops).values()] if isinstance(fit, Fit) else [name, f"- {fit}"])
    return rows


def spread(fits: dict[str, Fit | str], flops: float) -> str:
    """How far the laws are apart, in words."""
    best = {name: fit.law.allocate(flops) for name, fit in fits.items() if isinstance(fit, Fit)}
    if len(best) < 2:
        return ""
    least, most = (choose(best, key=lambda name: best[name].params) for choose in (min, max))
    factor = best[most].params / best[least].params
    says = f"{least} says {number(best[least].params)}, {most} {number(best[most].params)}"
    return f"the laws differ by a factor of {factor:.3g} in parameters: {says}"


def comparison_text(fits: dict[str, Fit | str], runs: Runs, flops: float) -> str:
    """What `plan.py compare` prints."""
    rows = comparison(fits, flops)
    whole = table([row for row in rows if len(row) > 2])
    reasons = [table([row for row in rows if len(row) == 2])] if any(len(row) == 2 for row in rows) else []
    some = next((fit for fit in fits.values() if isinstance(fit, Fit)), None)
    last = ["; ".join(filter(None, [resamples(some), spread(fits, flops)]))] if some else []
    return "\n".join([describe_runs(runs), f"{budget(runs, flops)}:", "", whole, *reasons, "", *last])


# Pieces of figures, which analyzers put together in their `draw`.


def size_colour(runs: Runs) -> Callable[[float], tuple]:
    """A colour for each number of parameters, from the smallest to the largest."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    scale = LogNorm(runs.params.min() * 0.999, runs.params.max() * 1.2)
    return lambda params: colormaps[SIZES](scale(params))


def draw_curves(axes: Axes, runs: Runs) -> None:
    """The loss of each run against its FLOPs."""
    colour = size_colour(runs)
    labels = np.unique(runs.run)
    for label in labels:
        curve = runs[runs.run == label]
        curve = curve[np.argsort(curve.flops)]
        axes.plot(curve.flops, curve.loss, "-" if len(curve) > 1 else ".", color=colour(curve.params[0]), lw=0.9, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="C, FLOPs", ylabel="loss, nats a token")
    plain_ticks(axes.yaxis)
    size_bar(axes, runs)


def draw_law(axes: Axes, fit: Fit, flops: np.ndarray, value: str, label: str = "law", colour: str = FITTED) -> None:
    """One column of the law's allocations ("params", "tokens", "loss") over a range of budgets, with the 95% interval."""
    budgets = np.geomspace(flops.min(), flops.max(), 100)

    def column(law: Law) -> np.ndarray:
        return getattr(law.allocate(budgets), value)

    if np.isfinite(column(fit.law)).any():
        axes.plot(budgets, column(fit.law), color=colour, lw=1.6, label=label)
        if interval := fit.interval(column):
            axes.fill_between(budgets, *interval, color=colour, alpha=0.18, lw=0, label="95% interval")


def draw_best(axes: Axes, fit: Fit, flops: np.ndarray, params: np.ndarray, label: str) -> None:
    """The best N against C: what it was fitted on, and the power law with a decade beyond."""
    axes.plot(flops, params, "o", ms=5, color="black", zorder=3, label=label)
    label = f"N ~ C^{fit.law.params_exponent:.3f}, a decade beyond"
    draw_law(axes, fit, np.array([flops.min(), 10 * flops.max()]), "params", label)
    axes.set(xscale="log", yscale="log", xlabel="C, FLOPs", ylabel="best N, parameters")
    axes.legend(frameon=False, fontsize=8)


def draw_contours(axes: Axes, runs: Runs, fit: Fit) -> None:
    """Lines of equal loss over FLOPs of training and parameters, with the points and the efficient frontier."""
    from matplotlib.colors import LogNorm

    log_c = np.log10([runs.flops.min() / 2, runs.flops.max() * 10])
    log_n = np.log10([runs.params.min() / 2, runs.params.max() * 4])
    c, n = np.meshgrid(np.logspace(*log_c, 200), np.logspace(*log_n, 200))
    loss = np.asarray(fit.law.predict(n, c / (6 * n)))
    levels = np.geomspace(np.nanmin(loss) * 1.005, runs.loss.max(), 16)
    colours = {"cmap": "magma_r", "norm": LogNorm(levels[0] * 0.85, levels[-1])}  # none too light to be seen
    lines = axes.contour(c, n, loss, levels=levels, linewidths=0.9, **colours)
    edges = {"edgecolors": "black", "linewidths": 0.3}
    axes.scatter(runs.flops, runs.params, s=12, c=runs.loss, zorder=3, label="runs", **edges, **colours)
    budgets = np.logspace(*log_c, 100)
    best = fit.law.allocate(budgets)
    training = 6 * best.params * best.tokens  # less than the budget where that pays for inference, too
    # Each line's number stands at the right, where the model is smaller than the best.
    at = int(0.93 * c.shape[1])
    below = n[:, at] < np.interp(c[0, at], training, best.params)
    rising = loss[below, at][::-1]
    where = [(c[0, at], np.interp(level, rising, n[below, at][::-1])) for level in levels if rising[0] < level < rising[-1]]
    axes.clabel(lines, fontsize=7, fmt="%.2f", manual=where)
    axes.plot(training, best.params, color=FITTED, lw=1.8, label="efficient frontier")
    if interval := fit.interval(lambda law: law.allocate(budgets).params):
        axes.fill_between(training, *interval, color=FITTED, alpha=0.18, lw=0, label="95% interval")
    axes.set(xscale="log", yscale="log", xlim=10**log_c, ylim=10**log_n, xlabel="C of training, FLOPs", ylabel="N, parameters")
    axes.set_title("lines of equal loss, nats a token", fontsize=9)
    axes.legend(frameon=True, fontsize=8, loc="upper left")


def draw_residuals(axes: Axes, runs: Runs, predicted: np.ndarray) -> None:
    """How far the measured loss is from the law's, against tokens."""
    colour = size_colour(runs)
    axes.axhline(0, color=FITTED, lw=1.2)
    axes.scatter(runs.tokens, 100 * (runs.loss / predicted - 1), s=12, c=[colour(n) for n in runs.params])
    axes.set(xscale="log", xlabel="D, tokens", ylabel="measured loss beyond the law's, %")
    size_bar(axes, runs)


def size_bar(axes: Axes, runs: Runs) -> None:
    """The key of the colours of sizes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    scale = LogNorm(runs.params.min() * 0.999, runs.params.max() * 1.2)
    axes.figure.colorbar(ScalarMappable(scale, SIZES), ax=axes, label="N, parameters", pad=0.02)


def plain_ticks(axis) -> None:
    """Numbers like 2.5 instead of powers of ten, on a logarithmic axis of less than a decade or two."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


# Whole figures and the page.


def figure(draw: Callable[[Figure], None], size: tuple[float, float] = (11, 4.2)) -> bytes:
    """A PNG of what `draw` puts on an empty figure."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2}
    with rc_context(style):
        new = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(new)
        draw(new)
        out = io.BytesIO()
        new.savefig(out, format="png")
    return out.getvalue()


def comparison_figure(fits: dict[str, Fit], runs: Runs, flops: float) -> bytes:
    """The best N and the loss of each law, from the runs to the budget."""
    from matplotlib.ticker import LogLocator

    def draw(figure: Figure) -> None:
        size, loss = figure.subplots(1, 2)
        budgets = np.array([min(runs.flops.min(), flops), max(runs.flops.max(), flops)])
        size.plot(runs.flops, runs.params, ".", color="grey", ms=3, label="runs")
        loss.plot(runs.flops, runs.loss, ".", color="grey", ms=3, label="runs")
        for i, (name, fit) in enumerate(fits.items()):
            draw_law(size, fit, budgets, "params", name, f"C{i}")
            draw_law(loss, fit, budgets, "loss", name, f"C{i}")
        for axes, label in ((size, "best N, parameters"), (loss, "loss, nats a token")):
            axes.axvline(flops, color="black", lw=0.8, ls=":")
            axes.set(xscale="log", yscale="log", xlabel="C, FLOPs (dotted: the budget)", ylabel=label)
            axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))  # numbers at all of them run into each other
            handles, labels = axes.get_legend_handles_labels()
            named = {label: handle for label, handle in zip(labels, handles, strict=True) if label != "95% interval"}
            axes.legend(named.values(), named.keys(), frameon=False, fontsize=8)
        plain_ticks(loss.yaxis)

    return figure(draw)


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd } table { border-collapse: collapse; margin: 1rem 0 }
td, th { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; border-bottom: 1px solid #eee }
td { font-variant-numeric: tabular-nums } img { max-width: 100% } .note { color: #555 }
"""

UNITS = (
    "C: FLOPs of training, N: parameters, D: tokens. The loss is in nats a token of the runs' own tokenizer, so it compares "
    "within one set of runs. Which parameters count and how FLOPs are counted is said with each law. Shaded and in brackets: "
    "95% intervals of a bootstrap over runs; they tell of the scatter of the runs, not of whether the law's form holds beyond."
)


def page(runs: Runs, fits: dict[str, Fit | str], figures: dict[str, bytes], flops: float | None) -> str:
    """One HTML page that needs no other file. figures: PNGs by the law's name, and "compare"."""

    def image(name: str) -> str:
        if name not in figures:
            return ""
        return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(figures[name]).decode()}">'

    def rows(lines: Sequence[Sequence[str]]) -> str:
        width = max(map(len, lines))
        text = ""
        for *cells, last in lines:  # the last of a short row, a reason, takes what is left
            text += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            text += f'<td colspan="{width - len(cells)}">{escape(last)}</td></tr>'
        return f"<table>{text}</table>"

    parts = [f"<p>{escape(describe_runs(runs))}.</p>", f'<p class="note">{UNITS}</p>']
    if flops:
        parts += [f"<h2>B{budget(runs, flops)[1:]}</h2>", rows(comparison(fits, flops))]
        parts += [f"<p>In short: {escape(spread(fits, flops))}.</p>" if spread(fits, flops) else "", image("compare")]
    for name, fit in fits.items():
        if isinstance(fit, Fit):
            notes = "".join(f"<li>{escape(note)}</li>" for note in fit.notes)
            parts += [f"<h2>{escape(name)}</h2>", f'<p class="note">{escape(fit.definition)}</p>', image(name)]
            parts += [rows(estimates(fit)), f'<p class="note">{escape(resamples(fit))}</p>', f"<ul>{notes}</ul>"]
    title = "Scaling laws"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
