"""Analyzers against independent fits of published measurements, against data whose law is known, and against their traps."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp

from nanopre import UserError
from nanopre.planning.fitting import fit_additive, fit_power_above_floor, huber
from nanopre.planning.laws import PUBLISHED, Additive, DataConstrained, InferenceAware
from nanopre.planning.runs import Runs, read_runs
from nanopre.planning.scaling import Fit, fit, read_law, resample
from nanopre.plugins import load_plugins

DATA = SHARED / "scaling"
measured = pytest.mark.skipif(not DATA.is_dir(), reason="the published measurements (shared/data/scaling) are not here")

PLUGINS = load_plugins()


def analyzer(name: str, **options):
    return PLUGINS.get("analyzer", name, "test")(**options)


def points(name: str, without_highest: int = 0, **columns: str) -> Runs:
    runs = read_runs([DATA / f"{name}.csv"], columns)
    return runs[np.sort(np.argsort(runs.loss)[: len(runs) - without_highest])]


def grid(law: Additive, sizes=(1e7, 3e7, 1e8, 3e8, 1e9), tokens=(3e8, 1e9, 3e9, 1e10, 3e10), noise: float = 0.0) -> Runs:
    """Runs of a known law, each size on each number of tokens."""
    n, d = (x.ravel() for x in np.meshgrid(sizes, tokens))
    return Runs(n, d, law.predict(n, d) * np.exp(noise * np.random.default_rng(0).standard_normal(len(n))))


KNOWN = Additive(A=420.0, B=1800.0, E=1.75, alpha=0.34, beta=0.37)


# The parametric fit.


@measured
def test_parametric_on_the_points_of_chinchilla():
    runs = points("chinchilla_points", without_highest=5)
    began = time.perf_counter()
    law = analyzer("parametric").fit(runs)
    assert len(runs) == 240 and time.perf_counter() - began < 5
    assert huber(np.log(law.predict(runs.params, runs.tokens) / runs.loss)) <= 1.01830e-3
    assert law.alpha == pytest.approx(0.347310, abs=0.0005) and law.beta == pytest.approx(0.367172, abs=0.001)
    assert law.beta / (law.alpha + law.beta) == pytest.approx(0.51390, abs=0.001)
    assert law.E == pytest.approx(1.817218, abs=0.0005)
    assert law.A == pytest.approx(477.826, rel=0.01) and law.B == pytest.approx(2143.42, rel=0.02)


@measured
@pytest.mark.parametrize(
    "name, objective, alpha, beta, floor",
    [
        ("chinchilla_points", 1.8260105e-3, 0.34931, 0.45305, 1.89134),
        ("gemstones_hot", 0.00198161, 0.29289, 0.71298, np.exp(0.7623)),
        ("gadre2024_c4", 5.29954e-4, 0.25257, 0.26223, 1.62002),
    ],
)
def test_parametric_on_other_measurements(name, objective, alpha, beta, floor):
    law, found = fit_additive(points(name))
    assert found <= objective * (1 + 1e-5)
    assert [law.alpha, law.beta, law.E] == pytest.approx([alpha, beta, floor], rel=0.005)


@measured
def test_where_the_mean_of_the_huber_terms_stalls_the_sum_does_not():
    runs = points("chinchilla_points", without_highest=5)
    n, d, log_loss = np.log(runs.params), np.log(runs.tokens), np.log(runs.loss)

    def mean(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * n, b - beta * d, e + 0 * n])
        predicted = logsumexp(terms, axis=0)
        share, residuals = np.exp(terms - predicted), predicted - log_loss
        slopes = np.stack([*share, -share[0] * n, -share[1] * d])
        return huber(residuals) / len(n), slopes @ np.clip(residuals, -1e-3, 1e-3) / len(n)

    start = PUBLISHED["chinchilla-3"][0]
    at_start = np.array([np.log(start.A), np.log(start.B), np.log(start.E), start.alpha, start.beta])
    stalled = minimize(mean, at_start, jac=True, method="L-BFGS-B")
    assert stalled.success and np.exp(stalled.x[:3]) == pytest.approx([406.40, 410.73, 1.6934], rel=1e-4)
    # Ours, from that very start, and from its own.
    for begin in (start, None):
        assert fit_additive(runs, begin)[1] == pytest.approx(1.018274e-3, rel=1e-5)
    assert len(n) * stalled.fun > 1.15 * 1.018274e-3


@settings(max_examples=8, deadline=None)
@given(st.floats(0.2, 0.6), st.floats(0.2, 0.6), st.floats(1.0, 3.0), st.floats(0.5, 2.0), st.floats(0.5, 2.0))
def test_parametric_finds_a_law_without_noise(alpha, beta, floor, of_size, of_data):
    # A and B such that both terms matter somewhere on the grid.
    law = Additive(of_size * 1e8**alpha / 2, of_data * 3e9**beta / 2, floor, alpha, beta)
    found = analyzer("parametric").fit(grid(law))
    assert vars(found) == pytest.approx(vars(law), rel=1e-5)


@pytest.mark.parametrize(
    "runs, sentence",
    [
        (grid(KNOWN)[np.arange(4)], "the additive law needs at least 5 points; the runs have 4."),
        (grid(KNOWN, sizes=[1e7]), "the additive law needs models of at least 2 sizes; the runs have 1."),
        (
            grid(KNOWN, tokens=[1e9]),
            "the additive law needs more than one value of tokens; of all points it is 1e+09.",
        ),
    ],
)
def test_what_parametric_can_not_fit(runs, sentence):
    with pytest.raises(UserError) as error:
        analyzer("parametric").fit(runs)
    assert str(error.value) == sentence


def test_a_law_that_the_runs_do_not_determine_is_refused():
    runs = grid(KNOWN, sizes=(1e7, 1e8, 1e9), tokens=(1e9, 3e9, 1e10))
    only_the_smallest_is_worse = dataclasses.replace(runs, loss=KNOWN.predict(1e9, runs.tokens) + (runs.params < 5e7))
    with pytest.raises(UserError, match=r"the additive law is not determined by these runs \(the best alpha is "):
        analyzer("parametric").fit(only_the_smallest_is_worse)
    with pytest.raises(UserError, match=r"Kaplan's law is not determined by these runs \(the best alpha_\w is "):
        analyzer("kaplan").fit(dataclasses.replace(runs, loss=2 + runs.tokens / 1e10))
    for column, words in (("params", "sizes"), ("tokens", "tokens")):
        alone = dataclasses.replace(runs, loss=2 + 100 / (runs.tokens if column == "params" else runs.params) ** 0.3)
        with pytest.raises(UserError, match=f"not determined by these runs: their loss does not depend on their {words}"):
            analyzer("parametric").fit(alone)


# The envelope.


@measured
def test_envelope_of_gemstones():
    runs = points("gemstones_hot_477")
    assert analyzer("envelope").fit(runs).params_exponent == pytest.approx(0.5384, abs=1e-3)
    # The other definition of an envelope moves the exponent by hundredths: which it was must be said.
    binned = analyzer("envelope", method="binned")
    assert 0.557 <= binned.fit(runs).params_exponent <= 0.569
    assert "hull" in analyzer("envelope").definition and "lowest curve at each of 50" in binned.definition


def test_envelope_of_budgets_whose_flops_differ_by_the_rounding_of_a_step():
    """The cheapest model of the first budget, by a fraction of a percent, is not on it for that: it may be the worst."""
    flops, n = (x.ravel() for x in np.meshgrid(np.geomspace(1e19, 1e22, 10), np.geomspace(1e7, 1e11, 61)))
    d = flops / (6 * n)
    runs = Runs(n, d, KNOWN.predict(n, d), flops * (1 - 0.003 * n / n.max()))
    exact = KNOWN.beta / (KNOWN.alpha + KNOWN.beta)
    assert analyzer("envelope").fit(runs).params_exponent == pytest.approx(exact, abs=0.02)


def test_envelope_of_curves_whose_best_models_are_known():
    # Sizes a factor of 1.5 apart, each with a dense curve: the best N of a budget is C^a to within a step.
    sizes = 1e7 * 1.5 ** np.arange(14)
    tokens = np.geomspace(1e8, 1e12, 300)
    runs = grid(KNOWN, sizes, tokens)
    runs.run = runs.params.copy()
    exact = KNOWN.beta / (KNOWN.alpha + KNOWN.beta)
    inside = runs[(runs.flops > KNOWN.best_tokens(3e7) * 6 * 3e7) & (runs.flops < KNOWN.best_tokens(1e9) * 6 * 1e9)]
    for method in ("hull", "binned"):
        law = analyzer("envelope", method=method).fit(inside)
        assert law.params_exponent == pytest.approx(exact, abs=0.01)
        assert law.allocate(1e19).params == pytest.approx(KNOWN.allocate(1e19).params, rel=0.1)
        assert law.allocate(1e19).loss == pytest.approx(KNOWN.allocate(1e19).loss, rel=1e-3)
        assert law.allocate(1e22).loss == pytest.approx(KNOWN.allocate(1e22).loss, rel=0.01)


def test_the_envelope_leaves_out_what_lies_above_it():
    runs = grid(KNOWN)
    envelope = analyzer("envelope")
    above = Runs(runs.params, runs.tokens, runs.loss * 1.5)
    both = Runs.concatenate([runs, above])
    both.run = np.arange(len(both))
    assert envelope.fit(both) == envelope.fit(runs)
    best = envelope.best(both)
    assert (np.diff(best.flops) > 0).all() and (np.diff(best.loss) < 0).all()


def test_an_envelope_of_one_size_is_refused():
    runs = grid(KNOWN, sizes=[1e8, 1.1e8])
    runs.loss[runs.params > 1e8] += 1
    with pytest.raises(UserError, match="needs models of at least 2 sizes on it; one size is the best at every cost"):
        analyzer("envelope").fit(runs)


def test_a_binned_envelope_needs_curves():
    with pytest.raises(UserError, match="the binned envelope needs training curves, points that share a run"):
        analyzer("envelope", method="binned").fit(grid(KNOWN))


def test_a_power_law_above_a_floor():
    x = np.geomspace(1, 1e4, 9)
    assert fit_power_above_floor(x, 1.7 + 2.5 * x**-0.16) == pytest.approx((1.7, 2.5, 0.16), rel=1e-5)


# IsoFLOP valleys.


def valleys(exponent: float = 0.47, sizes: int = 7, width: float = 2.0, off: float = 0.0) -> Runs:
    """Losses that are exact parabolas of log N, with minima at N = 3e8 (C/1e20)^exponent."""
    rows = []
    for flops in (1e18, 1e19, 1e20, 1e21):
        best = 3e8 * (flops / 1e20) ** exponent
        for log_n in np.log(best) + off + np.linspace(-width, width, sizes):
            loss = 1.5 + (flops / 1e18) ** -0.1 + 0.03 * (log_n - np.log(best)) ** 2
            rows.append((np.exp(log_n), flops / (6 * np.exp(log_n)), loss))
    return Runs(*np.array(rows).T)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 0.7), st.integers(3, 9), st.floats(0.5, 3.0), st.floats(-0.4, 0.4))
def test_isoflop_finds_the_minima_of_parabolas(exponent, sizes, width, off):
    law = analyzer("isoflop").fit(valleys(exponent, sizes, width, off))
    assert law.params_exponent == pytest.approx(exponent, abs=1e-6)
    assert law.tokens_exponent == pytest.approx(1 - exponent, abs=1e-6)
    best = law.allocate(1e22)
    assert best.params == pytest.approx(3e8 * 100**exponent, rel=1e-5) and 6 * best.params * best.tokens == pytest.approx(1e22)
    assert best.loss == pytest.approx(1.5 + 1e4**-0.1, rel=1e-5)


def test_isoflop_is_exact_for_an_additive_law_that_is_symmetric():
    law = Additive(A=500.0, B=1500.0, E=1.8, alpha=0.35, beta=0.35)
    rows = []
    for flops in (1e18, 1e19, 1e20, 1e21):
        n = law.allocate(flops).params * np.exp(np.linspace(-1.5, 1.5, 9))
        rows += list(zip(n, flops / (6 * n), law.predict(n, flops / (6 * n)), strict=True))
    assert analyzer("isoflop").fit(Runs(*np.array(rows).T)).params_exponent == pytest.approx(0.5, abs=1e-6)


def test_a_budget_whose_minimum_lies_at_an_edge_is_left_out_and_said():
    runs = valleys()
    edge = valleys(width=0.5, off=1.5)  # all of its sizes are too large
    mixed = Runs.concatenate([runs[runs.flops < 1e20], edge[edge.flops > 1e20]])
    isoflop = analyzer("isoflop")
    law = isoflop.fit(mixed)
    assert law.params_exponent == pytest.approx(0.47, abs=1e-6)
    said = isoflop.notes(mixed, law)
    assert said[0].startswith("left out: budget 1e+21: its minimum, ") and "lies beyond the sizes that were run" in said[0]
    with pytest.raises(UserError, match="isoflop needs at least 2 budgets, .*; found 0 .*lies beyond"):
        isoflop.fit(edge)


def test_the_bias_of_wide_parabolas_is_reported_as_large_as_it_is():
    law = Additive(A=300.0, B=20000.0, E=1.8, alpha=0.3, beta=0.45)
    exact = law.beta / (law.alpha + law.beta)

    def runs(width: float) -> Runs:
        rows = []
        for flops in (1e18, 1e19, 1e20, 1e21):
            n = law.allocate(flops).params * np.exp(np.linspace(-width, width, 11))
            rows += list(zip(n, flops / (6 * n), law.predict(n, flops / (6 * n)), strict=True))
        return Runs(*np.array(rows).T)

    isoflop, biases = analyzer("isoflop"), []
    for width in (1.0, 2.5, 4.0):
        found = isoflop.fit(runs(width))
        (said,) = [note for note in isoflop.notes(runs(width), found) if note.startswith("bias")]
        assert f"it finds a = {found.params_exponent:.4f} where {exact:.4f} is exact" in said
        biases.append(abs(np.log(found.allocate(1e20).params / law.allocate(1e20).params)))
    assert 0 < biases[0] < biases[1] < biases[2]


def test_isoflop_cuts_curves_at_budgets():
    runs = grid(KNOWN, 1e7 * 1.5 ** np.arange(14), np.geomspace(1e8, 1e12, 200))
    runs.run = runs.params.copy()
    with pytest.raises(UserError, match=r"found 0 .*--option isoflop.budgets=\[...\] cuts curves at FLOPs"):
        analyzer("isoflop").fit(runs)
    budgets = [1e18, 1e19, 1e20]
    law = analyzer("isoflop", budgets=budgets).fit(runs)
    # As if each size had been run to just these budgets.
    n, flops = (x.ravel() for x in np.meshgrid(np.unique(runs.params), budgets))
    exact = Runs(n, flops / (6 * n), KNOWN.predict(n, flops / (6 * n)))
    reached = exact[(exact.tokens >= 1e8) & (exact.tokens <= 1e12)]
    assert vars(law) == pytest.approx(vars(analyzer("isoflop").fit(reached)), rel=1e-3)


# Kaplan's laws.


def kaplan_law(**changes):
    estimates = {"N_c": 8.8e13, "alpha_N": 0.076, "D_c": 5.4e13, "alpha_D": 0.095}  # the paper's, appendix A
    rest = dict.fromkeys(["size_c", "size_alpha", "data_c", "data_alpha", "compute_c", "compute_alpha"], 1.0)
    return analyzer("kaplan").law(**estimates, **rest, **changes)


def test_kaplan_finds_its_law_without_noise():
    law = kaplan_law()
    found = analyzer("kaplan").fit(grid(law))
    for name in ("N_c", "alpha_N", "D_c", "alpha_D"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-5)
    best = found.allocate(1e20)
    for factor in (0.9, 1.1):
        assert found.predict(best.params * factor, best.tokens / factor) > best.loss


def test_kaplan_of_one_limit_alone():
    # Models on so much data that only their size tells, and the other way round.
    law = kaplan_law()
    by_size = analyzer("kaplan").fit(grid(law, sizes=(1e5, 1e6, 1e7), tokens=(1e17, 1e18)))
    assert by_size.size_alpha == pytest.approx(0.076, rel=1e-3) and by_size.size_c == pytest.approx(8.8e13, rel=0.02)
    by_data = analyzer("kaplan").fit(grid(law, sizes=(1e17, 1e18), tokens=(1e7, 1e8, 1e9)))
    assert by_data.data_alpha == pytest.approx(0.095, rel=1e-3) and by_data.data_c == pytest.approx(5.4e13, rel=0.02)


@pytest.mark.parametrize("counted", [True, False])
def test_kaplan_says_which_count_of_parameters_fits_better(counted):
    law = kaplan_law()
    runs = grid(law)
    embeddings = 2000 * np.sqrt(runs.params)
    if counted:
        runs = dataclasses.replace(runs, embedding_params=embeddings)
    else:  # the loss follows from the parameters without embeddings
        runs = dataclasses.replace(runs, params=runs.params + embeddings, embedding_params=embeddings, flops=None)
    kaplan = analyzer("kaplan", embeddings=counted)
    found = kaplan.fit(runs)
    assert found.alpha_N == pytest.approx(0.076, rel=1e-4)
    assert f"N {'with' if counted else 'without'} embeddings fits better" in kaplan.notes(runs, found)[0]


def test_kaplan_finds_the_critical_batch_size():
    # E = E_min(L) (1 + B / B_crit(L)), B_crit = 2e8 / L^(1/0.21), the paper's; E_min from the loss by a power law.
    losses = np.geomspace(5.0, 3.0, 40)
    curves = []
    for batch in (2**14, 2**15, 2**16, 2**17, 2**18):
        tokens = (10 / losses) ** (1 / 0.1) * 1e5 * (1 + batch / (2e8 / losses ** (1 / 0.21)))
        curves.append(Runs(np.full(40, 1e8), tokens, losses, run=np.full(40, batch), batch_size=np.full(40, batch)))
    found = analyzer("kaplan").fit(Runs.concatenate([*curves, grid(kaplan_law(), sizes=(1e7, 1e9))]))
    assert found.alpha_B == pytest.approx(0.21, rel=0.01) and found.B_star == pytest.approx(2e8, rel=0.03)
    assert found.critical_batch(4.0) == pytest.approx(2e8 / 4 ** (1 / 0.21), rel=0.01)


def test_kaplan_studies_the_shape_at_equal_size():
    law = kaplan_law()
    runs = grid(law, sizes=(1e7, 1e8, 1e9), tokens=(1e9, 1e10))
    wide = Runs.concatenate([
        dataclasses.replace(runs, loss=runs.loss * (1 + 0.01 * np.log(ratio / 50) ** 2), d_model=np.full(6, 8 * ratio),
                            n_layers=np.full(6, 8.0), run=runs.run + 10 * i)
        for i, ratio in enumerate((5, 15, 50, 150, 500))
    ])  # fmt: skip
    kaplan = analyzer("kaplan")
    said = kaplan.notes(wide, kaplan.fit(wide))[-1]
    best, price = re.search(r"n_layers = (\d+) is the best of 5 to 500; a ratio 4 times off costs ([0-9.]+)%", said).groups()
    assert best == "50" and float(price) == pytest.approx(np.log(4) ** 2, abs=0.05)


# Repeated data, and inference.


@measured
def test_muennighoffs_published_parameters_have_their_objective():
    runs = points("muennighoff2023_runs", loss="val_loss")
    law = PUBLISHED["muennighoff"][0]
    assert len(runs) == 182
    residuals = np.log(law.predict(runs.params, runs.tokens, runs.unique_tokens) / runs.loss)
    assert huber(residuals) == pytest.approx(1.58259e-2, abs=1e-6)
    # Ours fits the same runs with less.
    ours = analyzer("data_constrained").fit(runs)
    residuals = np.log(ours.predict(runs.params, runs.tokens, runs.unique_tokens) / runs.loss)
    assert huber(residuals) < 0.8e-2


def repeated(law: DataConstrained) -> Runs:
    once = grid(law, sizes=(3e7, 1e8, 3e8, 1e9, 3e9), tokens=(1e10, 3e10, 1e11, 3e11))
    # Of the runs that repeat nothing only those whose parameters are all of use, so that the additive law is exact.
    once = once[once.params <= law.best_params(once.tokens)]
    n, u, epochs = (x.ravel() for x in np.meshgrid((1e7, 1e8, 1e9), (1e8, 1e9), (2, 4, 8, 16, 40)))
    again = Runs(n, u * epochs, law.predict(n, u * epochs, u), unique_tokens=u)
    return Runs.concatenate([once, again])


def test_data_constrained_finds_its_law_without_noise():
    law = DataConstrained(**vars(KNOWN), R_D=12.0, R_N=6.0)
    assert vars(analyzer("data_constrained").fit(repeated(law))) == pytest.approx(vars(law), rel=1e-4)


def test_data_constrained_says_what_it_lacks():
    with pytest.raises(UserError, match="needs runs that repeat data .unique_tokens below tokens.; there is none"):
        analyzer("data_constrained").fit(grid(KNOWN))
    runs = repeated(DataConstrained(**vars(KNOWN)))
    with pytest.raises(UserError, match="of the runs that repeat no data: the additive law needs at least 5 points"):
        analyzer("data_constrained").fit(runs[runs.unique_tokens < runs.tokens])


def test_inference_aware_is_the_additive_law_with_a_price():
    found = analyzer("inference_aware", inference_tokens=2e12).fit(grid(KNOWN))
    assert isinstance(found, InferenceAware) and found.inference_tokens == 2e12
    assert found.allocate(1e23).params < KNOWN.allocate(1e23).params
    with pytest.raises(UserError, match="inference_aware needs the lifetime's tokens"):
        analyzer("inference_aware").fit(grid(KNOWN))


def test_inference_aware_prices_the_quality_of_a_reference():
    chosen = analyzer("inference_aware", inference_tokens=2e12)
    law = InferenceAware(406.4, 410.7, 1.69, 0.336, 0.283, inference_tokens=2e12)
    (said,) = chosen.notes(None, law)
    assert said == (
        "1.3e+10 parameters on 5.76e+11 tokens are the best to train alone; their quality costs least with 6.97e+09 on "
        "1.25e+12: 17.4% less training and inference"
    )


# Every analyzer.

NAMES = ["data_constrained", "envelope", "inference_aware", "isoflop", "kaplan", "parametric"]


def examples(name: str) -> tuple[object, Runs]:
    """An analyzer, and runs that it can fit."""
    special = {"isoflop": valleys(), "data_constrained": repeated(DataConstrained(**vars(KNOWN)))}
    options = {"inference_tokens": 1e12} if name == "inference_aware" else {}
    return analyzer(name, **options), special.get(name, grid(KNOWN, noise=0.003))


def test_these_are_all():
    assert sorted(PLUGINS.offers("analyzer")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_comes_back_from_its_file(name, tmp_path):
    chosen, runs = examples(name)
    found = fit(chosen, name, runs, bootstrap=8)
    text = json.dumps(found.to_dict(), allow_nan=False)
    (tmp_path / "law.json").write_text(text)
    again = read_law(str(tmp_path / "law.json"), PLUGINS)
    assert json.dumps(again.to_dict(), allow_nan=False) == text and type(again.law) is chosen.law
    assert len(again.samples) + again.failed == 8
    low, high = again.interval(lambda law: law.allocate(1e21).params)
    assert (low, high) == found.interval(lambda law: law.allocate(1e21).params) and 0 < low <= high
    assert again.definition == chosen.definition and "N:" in again.definition and "C" in again.definition


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_points_does_not_matter(name):
    chosen, runs = examples(name)
    shuffled = runs[np.random.default_rng(1).permutation(len(runs))]
    assert vars(chosen.fit(shuffled)) == pytest.approx(vars(chosen.fit(runs)), rel=1e-5, nan_ok=True)


def test_a_bootstrap_draws_whole_runs():
    runs = grid(KNOWN, noise=0.01)
    runs.run = runs.params.copy()  # a size is a curve
    seen = []

    class Watching:
        def fit(self, drawn):
            seen.append(drawn)
            if len(np.unique(drawn.run)) < 3:
                raise UserError("too few")
            return KNOWN

    laws, failed = resample(Watching(), runs, KNOWN, 50)
    assert len(seen) == 50 and len(laws) + failed == 50 and 0 < failed < 25
    for drawn in seen:
        assert len(drawn) == len(runs)
        _, counts = np.unique(drawn.run, return_counts=True)
        assert (counts % 5 == 0).all()  # each with all of its five points, as often as it was drawn
    again, _ = resample(Watching(), runs, KNOWN, 50)
    assert all((a.loss == b.loss).all() for a, b in zip(seen[:50], seen[50:], strict=True)) and len(again) == len(laws)


def test_no_interval_without_a_bootstrap():
    assert Fit(KNOWN, "parametric", "").interval(lambda law: law.alpha) is None


@measured
def test_a_short_bootstrap_has_errors_of_the_right_size():
    runs = points("chinchilla_points", without_highest=5)
    found = fit(analyzer("parametric"), "parametric", runs, bootstrap=60, seed=1)
    # 60 resamples know a standard error to within a tenth or so (1 / sqrt(2 * 60)); three times that is allowed here.
    assert np.std([law.alpha for law in found.samples], ddof=1) == pytest.approx(0.0151, rel=0.3)


@measured
@pytest.mark.slow
def test_the_bootstrap_of_chinchillas_points():
    runs = points("chinchilla_points", without_highest=5)
    began = time.perf_counter()
    found = fit(analyzer("parametric"), "parametric", runs, bootstrap=1000)
    assert time.perf_counter() - began < 60 and len(found.samples) == 1000
    errors = {name: np.std([getattr(law, name) for law in found.samples], ddof=1) for name in ("A", "B", "E", "alpha", "beta")}
    assert errors["alpha"] == pytest.approx(0.0151, rel=0.1) and errors["beta"] == pytest.approx(0.0206, rel=0.1)
    assert errors["E"] == pytest.approx(0.025, rel=0.1)
    assert np.std([law.beta / (law.alpha + law.beta) for law in found.samples], ddof=1) == pytest.approx(0.0199, rel=0.1)
    assert errors["A"] == pytest.approx(122, rel=0.2) and errors["B"] == pytest.approx(1277, rel=0.2)
    assert found.interval(lambda law: law.allocate(5.76e23).params) == pytest.approx((51.5e9, 111e9), rel=0.05)
    assert found.interval(lambda law: law.allocate(5.76e23).loss) == pytest.approx((1.951, 2.001), abs=0.003)
