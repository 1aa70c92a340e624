"""plan.py sweep: the design by its sums, the runs by what separate ones give, and what is said of bad input."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_log
from hypothesis import given, strategies as st

import plan
import train
from nanopre import UserError, config as configs, corpus as corpora
from nanopre.cost import parameters
from nanopre.planning import sweep
from nanopre.planning.shape import scaled

STOP_ONCE = """
import os, pathlib, signal
from nanopre import hookimpl

@hookimpl
def nanopre_step_end(run, step):
    stopped = pathlib.Path(run.config.out_dir) / "stopped"
    if step == 69 and not stopped.exists():
        stopped.touch()
        os.kill(os.getpid(), signal.SIGTERM)
"""
LAUNCH = f"{sys.executable} {{train}} {{config}}"
DESIGN = ["--budget=1e11", "--sizes=3", "--tokens-per-param=1", "--span=3"]


@pytest.fixture
def base(tiny) -> Path:
    """The tiny config, with heads that are narrow enough for small steps between models."""
    config = Path(tiny[0])
    text = config.read_text().replace("n_heads = 2, n_kv_heads = 1", "n_heads = 4, n_kv_heads = 2")
    config.write_text(text.replace("batch_size = 8", "batch_size = 2"))
    return config


@given(
    st.sampled_from(["envelope", "isoflop", "parametric"]),
    st.floats(1e9, 1e22),
    st.integers(2, 8),
    st.integers(2, 6),
    st.floats(1.5, 100),
    st.floats(1.2, 4),
    st.floats(1, 100),
    st.floats(0.05, 0.5),
)
def test_a_ladder_spends_the_budget(approach, budget, n_sizes, n_budgets, span, size_ratio, tokens_per_param, decay):
    rungs = sweep.ladder(approach, budget, n_sizes, n_budgets, span, size_ratio, tokens_per_param, decay)
    spent = sum(own[-1] + decay * sum(own[:-1]) for _, own in rungs)
    assert spent == pytest.approx(budget)
    at: dict[float, list[float]] = {}
    for params, own in rungs:
        assert own == sorted(own)
        for one in own:
            at.setdefault(float(f"{one:.9g}"), []).append(params)
    budgets = sorted(at)
    assert len(budgets) == n_budgets and budgets[-1] / budgets[0] == pytest.approx(span)
    for one, sizes in at.items():
        assert len(sizes) == n_sizes
        assert [b / a for a, b in zip(sizes, sizes[1:], strict=False)] == pytest.approx([size_ratio] * (n_sizes - 1))
        if approach == "isoflop":  # around the size that is guessed to be the best, within half a rung
            middle = (sizes[0] * sizes[-1]) ** 0.5 / (one / (6 * tokens_per_param)) ** 0.5
            assert size_ratio**-0.501 < middle < size_ratio**0.501


def test_scaled_models_keep_the_proportions(base):
    config, _ = configs.load(base)
    for params in (1e5, 1e6, 1e8):
        model, settings = scaled(config, params, 361)
        assert settings.head_dim == 8 and settings.n_kv_heads * 2 in (settings.n_heads, 2 * settings.n_heads)
        assert settings.d_ff == settings.d_model * 48 // 32 and settings.mup_base_width == 32
        assert abs(settings.n_layers - settings.d_model / 16) <= 0.5
        assert parameters(settings)["total"] == pytest.approx(params, rel=0.2)
        del model["name"]
        assert type(config.model)(**model).settings(384, 48) == settings


@pytest.mark.slow
def test_one_trunk_gives_what_separate_runs_give(base, tmp_path):
    """Bit for bit, though it was interrupted; and what is done is not done again."""
    (tmp_path / "stop.py").write_text(STOP_ONCE)
    base.write_text(f'plugins = ["{tmp_path}/stop.py"]\n{base.read_text()}')
    config, plugins = configs.load(base)
    config.schedule.decay_fraction = 0.25
    out = tmp_path / "sweep"
    corpus = corpora.prepare(config, plugins)
    model = parameters(config.model.settings(384, 48))["total"]
    design = sweep.design(config, [(model, [6.0 * model * 96 * n for n in (60, 100)])], corpus, out)
    assert [point.steps for point in design.sizes[0].points] == [60, 100]
    assert design.flops == 6.0 * model * 96 * (100 + 15)
    sweep.write(design, out)
    with pytest.raises(UserError, match=r"stopped after step 70 of 100; the same command goes on"):
        sweep.Runner(out, ROOT / "train.py", LAUNCH, 1).run(design)
    sweep.Runner(out, ROOT / "train.py", LAUNCH, 1).run(design)
    sweep.Runner(out, ROOT / "train.py", "false {train} {config}", 1).run(design)

    rows = sweep.collect(design, out)
    assert [(row["params"], row["tokens"], row["flops"]) for row in rows] == [
        (model, n * 96, 6.0 * model * n * 96) for n in (60, 100)
    ]
    assert [float(row["loss"]) for row in csv.DictReader(open(out / "points.csv"))] == [row["loss"] for row in rows]
    for point, row in zip(design.sizes[0].points, rows, strict=True):
        train.main([str(out / f"{point.name}.toml"), f"--out_dir={tmp_path}/alone", "--plugins=[]"])
        steps, evaluations = read_log(tmp_path / "alone" / point.name)
        ours, _ = read_log(out / "runs" / point.name)
        assert [line["loss"] for line in ours] == [line["loss"] for line in steps]
        assert row["loss"] == evaluations[-1]["val_loss"]


def run_plan(capsys, *arguments) -> str:
    plan.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_a_design_is_told_and_written(base, tmp_path, capsys):
    command = ["sweep", base, *DESIGN, f"--out={tmp_path}/s"]
    text = run_plan(capsys, *command)
    files = sorted((tmp_path / "s").glob("*.toml"))
    assert len(files) == 9 and all(file.stem in text for file in files)
    for file in files:
        config, _ = configs.load(file)
        params = parameters(config.model.settings(384, 48))["total"]
        assert f"{params:,}" in text and config.schedule.name == "wsd"
        assert 6 * params * config.train.steps * 96 == pytest.approx(float(file.stem.rpartition("-")[2]), rel=0.06)
    assert run_plan(capsys, *command) == text
    with pytest.raises(UserError, match="holds another sweep"):
        plan.main([*map(str, command), "--span=5"])


def test_a_model_that_was_lost_is_no_point(base, tmp_path, capsys):
    command = ["sweep", base, *DESIGN, f"--out={tmp_path}/s"]
    run_plan(capsys, *command)
    for i, file in enumerate(sorted((tmp_path / "s").glob("*.toml"))):
        config, _ = configs.load(file)
        (folder := tmp_path / "s" / "runs" / config.name).mkdir(parents=True)
        loss = 5 + 0.1 * i if i else math.nan
        (folder / "log.jsonl").write_text(json.dumps({"step": config.train.steps, "val_loss": loss}) + "\n")
    points = json.loads(run_plan(capsys, *command, "--json"), parse_constant=pytest.fail)["points"]
    assert len(points) == 9 and [point["loss"] for point in points].count(None) == 1
    assert len(list(csv.DictReader(open(tmp_path / "s" / "points.csv")))) == 8
    assert len(re.findall("lost$", run_plan(capsys, *command), re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=1e8"], r"--budget: d\d+-l\d has \d+ steps of 96 tokens, and 50 are the fewest"),
        (["--budget=0"], "argument --budget: 0 must be above 0"),
        (["--sizes=1"], "argument --sizes: 1 must be at least 2"),
        (["--size-ratio=1.1"], "--size-ratio: two of the sizes, near .* are the same model"),
        (["--launch=torchrun train.py"], r"--launch 'torchrun train.py': lacks the words \{train\} and \{config\}"),
        (["--launch=python '{train} {config}"], "--launch .*: no closing quotation; quote its words as a shell does"),
        (["--span=1.1", "--budgets=9"], "--span: two budgets near .* FLOPs would have one name; raise it, or lower --budgets"),
        (["--schedule.decay_fraction=1"], "schedule.decay_fraction = 1: leaves no steps at a constant rate; lower it"),
        (["--out=/dev/null/s"], r"--out /dev/null/s: can't be written \("),
        (["--approach=kaplan"], "--approach kaplan: there is no such choice; choose from envelope, isoflop, parametric."),
    ],
)
def test_bad_input_is_one_sentence(base, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as error:
        plan.main(["sweep", str(base), *DESIGN, f"--out={tmp_path}/s", *flags])
    assert "\n" not in str(error.value)


def test_a_family_without_mup_is_refused(base, tmp_path):
    base.write_text(
        base.read_text().replace('"llama"', '"t5"').replace(", n_kv_heads = 2", "") + "\n[objective]\nname = 'span_corruption'"
    )
    with pytest.raises(UserError, match="model.name = t5 has no mup_base_width"):
        plan.main(["sweep", str(base), *DESIGN, f"--out={tmp_path}/s"])


def test_a_run_that_fails_is_named_with_its_last_line(base, tmp_path):
    command = ["sweep", str(base), *DESIGN, f"--out={tmp_path}/s", "--run"]
    with pytest.raises(UserError, match=r"d\d+-l\d-\d.*: train.py ended with status 1 \(.*\); see .*logs"):
        plan.main([*command, "--launch=cat {train} {config}"])


@pytest.mark.slow
def test_a_whole_sweep_ends_with_the_laws(base, tmp_path, capsys):
    flags = ["--budget=4e10", "--budgets=2", "--run", "--jobs=2", "--target=1e11"]
    text = run_plan(capsys, "sweep", base, *DESIGN, f"--out={tmp_path}/s", *flags)
    assert "6 runs are done" in text and "best use of 1.000e11 FLOPs" in text
    for law in ("envelope", "isoflop", "kaplan", "parametric"):
        assert re.search(f"^{law} ", text, re.MULTILINE)
    assert (tmp_path / "s" / "report.html").stat().st_size > 10_000
