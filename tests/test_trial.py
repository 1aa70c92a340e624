"""plan.py lr, batch and upscale."""

from __future__ import annotations

import json
import math

import pytest
from conftest import run_script
from hypothesis import given, strategies as st

import plan
import train
from nanopre import UserError, config as configs
from nanopre.planning import trial
from nanopre.planning.trial import Measured, RangeTest


def run_plan(capsys, *arguments) -> dict:
    plan.main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_range_test_reads_its_curve():
    """A loss that falls by 4 and then rises: a fifth of the fall is lost 8 steps after the minimum."""
    rates = [1e-4 * 2**i for i in range(61)]
    losses = [8 - 0.1 * i for i in range(41)] + [4 + 0.1 * i for i in range(1, 21)]
    test = RangeTest(rates, losses, losses)
    assert test.biggest == pytest.approx(rates[48]) and test.recommended == pytest.approx(rates[40] / 10)
    assert "The biggest that does not blow up: 2.8e+10" in test.text()
    assert RangeTest(rates[:45], losses[:45], losses[:45]).biggest is None
    assert RangeTest(rates[:42], [*losses[:41], math.nan], [*losses[:41], math.nan]).biggest == rates[40]


def test_a_range_test_that_blows_up_at_once_has_a_curve():
    test = RangeTest([1.0, 30.0, 1000.0], [5.0, 4.0, math.nan], [5.0, 4.5, math.nan])
    assert "1e+00  learning rate, geometric  1e+03" in test.text()
    assert (test.biggest, test.recommended) == (30, 3)  # of the steps that have a loss
    risen = RangeTest([1.0, 30.0], [5.0, 9.0], [5.0, 7.1])
    assert risen.biggest is None and risen.text().endswith("The loss never fell from 1 on: lower --low.")


def test_a_range_test_of_a_training(tiny, tmp_path, capsys):
    result = run_plan(capsys, "lr", tiny[0], "--low=1e-4", "--high=30", "--steps=60", f"--figure={tmp_path}/lr.png")
    losses, rates = result["losses"], result["rates"]
    assert rates[0] == 1e-4 and 1e-3 < result["recommended"] < result["biggest"] < 30
    assert min(losses) < losses[0] - 1  # it learns on the way,
    at_the_biggest = losses[rates.index(result["biggest"])]
    assert max(losses) > at_the_biggest + 0.5  # and is worse off beyond
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"


def test_trials_are_the_steps_of_a_run(tiny, tmp_path, capsys):
    """At the configured rates, the losses of train.py."""
    config, plugins = configs.load(tiny[0], ["--schedule.name=constant", "--schedule.warmup_steps=0", "--train.steps=4"])
    ours = trial.Trial(config, plugins)
    losses = [ours.step(step, 1.0)[0] for step in range(4)]
    train.train(config, plugins)
    log = (tmp_path / "runs" / "tiny" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in log if '"lr"' in line] == losses


@given(st.integers(0, 300), st.integers(1, 300))
def test_the_largest_batch_is_found_by_few_trials(limit, up_to):
    tried = trial.largest_batch(lambda rows: Measured(rows, 1.0 if rows <= limit else None, None), up_to)
    assert max((m.rows for m in tried if m.fits), default=0) == min(limit, up_to)
    assert len(tried) == len({m.rows for m in tried}) <= 2 * math.log2(up_to) + 3


def test_batches_are_tried_in_processes_of_their_own(tiny, capsys):
    result = run_plan(capsys, "batch", tiny[0], "--up-to=1", "--steps=1")
    (one,) = result["tried"]
    assert result["device"] == "cpu" and one["rows"] == 1 and one["tokens_per_second"] > 10
    assert 50e6 < one["memory"] < 4e9


def test_what_is_said_of_batches():
    tried = [Measured(1, 100.0, 2**30), Measured(2, 190.0, 2**30), Measured(4, 194.0, 2**31), Measured(8, None, None)]
    text = trial.batch_text(tried, 16, 2.5 * 2**30)
    assert "fits in 2.5 GiB (--memory): 4 rows." in text and "train.micro_batch_size = 2" in text
    assert "Not even one row fits" in trial.batch_text([Measured(1, None, None)], 16, None)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["lr", "CONFIG", "--low=1", "--high=0.1"], "--low 1: must be below --high 0.1"),
        (["lr", "CONFIG", "--steps=3"], "argument --steps: 3 must be at least 20"),
        (["lr", "no.toml"], "no.toml: can't be read"),
        (["batch", "CONFIG", "--up-to=0"], "argument --up-to: 0 must be at least 1"),
        (["batch", "CONFIG", "--memory=-1"], "argument --memory: -1 must be above 0"),
        (["upscale", "runs", "--params=1e6", "--tokens=1e300", "--out=x.toml"], "must be at most 1.67e.28 for that many"),
        (["upscale", "no-runs", "--params=1e6", "--tokens=1e6", "--out=x.toml"], "no-runs: no run with a validation loss"),
    ],
)
def test_bad_input_is_one_sentence(tiny, command, message):
    with pytest.raises(UserError, match=message) as error:
        plan.main([tiny[0] if word == "CONFIG" else word for word in command])
    assert "\n" not in str(error.value)


def test_the_best_of_small_runs_becomes_a_big_one(tiny, tmp_path, capsys):
    for lr in ("1e-5", "3e-3"):
        train.main([*tiny, f"--name=lr-{lr}", f"--optimizer.lr={lr}"])
    capsys.readouterr()
    big = tmp_path / "big.toml"
    result = run_plan(capsys, "upscale", tmp_path / "runs", "--params=5e5", "--tokens=1e6", f"--out={big}")
    assert result["from"].endswith("lr-3e-3")
    config, _ = configs.load(big)
    assert config.optimizer.lr == 3e-3 and config.model.mup_base_width == 32 and config.model.d_model > 64
    assert config.train.steps == round(1e6 / (8 * 48))
    train.main([str(big), "--train.steps=1"])
    assert (tmp_path / "runs" / "big" / "checkpoints" / "latest").exists()
    with pytest.raises(UserError, match=r"--params 10000: gives a model of width \d+, no wider than the 32 of"):
        plan.main(["upscale", str(tmp_path / "runs"), "--params=1e4", "--tokens=1e6", f"--out={big}"])


def test_a_mistake_is_a_sentence_and_status_2(tiny):
    result = run_script("plan.py", "lr", tiny[0], "--low=1", "--high=1")
    assert result.returncode == 2 and result.stderr == "plan.py: --low 1: must be below --high 1.\n"
