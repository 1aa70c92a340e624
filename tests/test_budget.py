"""plan.py budget: published tables, closed forms and brute force for what it says; a run of what it writes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import read_log, run_script
from hypothesis import given, settings, strategies as st

import plan
import train
from nanopre import UserError, accelerators, config as configs, parallel
from nanopre.distributed import World, build_model
from nanopre.planning import preview, proposal, recipe
from nanopre.planning.budget import flops_for
from nanopre.planning.laws import PUBLISHED

# FLOP, parameters and tokens of the best models: Hoffmann et al. (2022), table 3.
TABLE = [
    (1.92e19, 400e6, 8.0e9),
    (1.21e20, 1e9, 20.2e9),
    (1.23e22, 10e9, 205.1e9),
    (5.76e23, 67e9, 1.5e12),
    (3.85e24, 175e9, 3.7e12),
    (9.90e24, 280e9, 5.9e12),
    (3.43e25, 520e9, 11.0e12),
    (1.27e26, 1e12, 21.2e12),
    (1.30e28, 10e12, 216.2e12),
]


@pytest.fixture
def budget(capsys):
    def run(*flags) -> dict:
        """What `plan.py budget --json` prints."""
        plan.main(["budget", "--json", *map(str, flags)])
        return json.loads(capsys.readouterr().out)

    return run


def law_file(path, samples=(), **estimates) -> str:
    """A file as plan.py fit writes it, of the additive law."""
    bootstrap = {name: [sample[name] for sample in samples] for name in estimates} if samples else {}
    table = {"analyzer": "parametric", "options": {}, "definition": "of a test", "estimates": estimates}
    path.write_text(json.dumps(table | {"bootstrap": bootstrap, "failed": 0, "notes": []}))
    return str(path)


# Parameters and tokens


@pytest.mark.parametrize(("flops", "params", "tokens"), TABLE)
def test_chinchilla_1_is_the_published_table_in_both_directions(budget, flops, params, tokens):
    there = budget("--law", "chinchilla-1", "--flops", flops)
    assert there["chosen"]["params"] == pytest.approx(params, rel=0.05)
    assert there["chosen"]["tokens"] == pytest.approx(tokens, rel=0.05)
    assert there["run"]["tokens"] == pytest.approx(tokens, rel=0.05)
    assert there["model"]["parameters"]["total"] == pytest.approx(params, rel=0.05)
    assert flops_for(PUBLISHED["chinchilla-1"][0], params) == pytest.approx(flops, rel=0.05)


def test_a_budget_may_be_said_by_the_parameters_it_is_best_for(budget):
    said = budget("--law", "chinchilla-1", "--params", 175e9)
    assert said["budget"]["flops"] == pytest.approx(3.85e24, rel=0.05)
    assert said["chosen"]["tokens"] == pytest.approx(3.7e12, rel=0.05)


def test_chinchilla_3_has_its_exponents_unrounded(budget, tmp_path):
    """Hoffmann et al. (2022), table A3: 40B at 5.76e23 FLOP, which the exponents as printed in equation 10 do not give."""
    assert budget("--law", "chinchilla-3", "--flops", 5.76e23)["chosen"]["params"] == pytest.approx(40e9, rel=0.02)
    rounded = law_file(tmp_path / "rounded.json", A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28)
    assert budget("--law", rounded, "--flops", 5.76e23)["chosen"]["params"] == pytest.approx(32e9, rel=0.02)


def test_a_13b_models_quality_for_2e12_tokens_of_inference_is_cheapest_at_7b(budget, tmp_path):
    """Sardana et al. (2023), section 3: a 7B model saves 1.7e22 FLOP, 17%, with their constants (appendix)."""
    constants = law_file(tmp_path / "theirs.json", A=406.4, B=410.7, E=1.69, alpha=0.336, beta=0.283)
    said = budget("--law", constants, "--params", 13e9, "--inference-tokens", 2e12)
    lifetime = said["inference"]["lifetime_flops"]
    assert said["chosen"]["params"] == pytest.approx(7e9, rel=0.01)
    assert lifetime["best"] - lifetime["chosen"] == pytest.approx(1.7e22, rel=0.01)
    assert 1 - lifetime["chosen"] / lifetime["best"] == pytest.approx(0.17, abs=0.005)
    assert said["chosen"]["loss"] == pytest.approx(said["best"]["loss"], rel=1e-9)
    # Brute force: no other size reaches the loss for less.
    params = np.geomspace(3e9, 13e9, 20_000)
    left = said["best"]["loss"] - 1.69 - 406.4 / params**0.336
    tokens = (410.7 / np.where(left > 0, left, np.nan)) ** (1 / 0.283)
    assert lifetime["chosen"] == pytest.approx(np.nanmin(6 * params * tokens + 2 * params * 2e12), rel=1e-6)
    # The exponents unrounded say nearly the same.
    said = budget("--law", "chinchilla-3", "--params", 13e9, "--inference-tokens", 2e12)
    lifetime = said["inference"]["lifetime_flops"]
    assert said["chosen"]["params"] == pytest.approx(7.1e9, rel=0.01)
    assert 1 - lifetime["chosen"] / lifetime["best"] == pytest.approx(0.16, abs=0.005)


def test_tokens_that_repeat_are_spent_as_brute_force_spends_them(budget):
    said = budget("--law", "besiroglu", "--flops", 1e22, "--tokens-available", 2e10)

    def loss(params, tokens, unique=2e10):  # Muennighoff et al. (2023), equations 5 and 6, on Besiroglu's constants
        ratio = (0.3478 * 482.01 / (0.3658 * 2085.43)) ** (1 / (0.3478 + 0.3658))
        enough = np.minimum(ratio * (ratio * unique) ** (0.3658 / 0.3478), params)
        tokens = unique + 15.3878 * unique * (1 - np.exp(-(tokens / unique - 1) / 15.3878))
        params = enough + 5.3097 * enough * (1 - np.exp(-(params / enough - 1) / 5.3097))
        return 1.8172 + 482.01 / params**0.3478 + 2085.43 / tokens**0.3658

    params = np.geomspace(1e8, 1e11, 200_000)
    losses = loss(params, 1e22 / (6 * params))
    assert said["chosen"]["loss"] == pytest.approx(losses.min(), rel=1e-6)
    assert said["chosen"]["params"] == pytest.approx(params[losses.argmin()], rel=0.01)
    assert said["chosen"]["params"] < said["best"]["params"] and said["chosen"]["loss"] > said["best"]["loss"]
    assert said["data"]["epochs"] == pytest.approx(1e22 / (6 * said["chosen"]["params"]) / 2e10)
    # What the budget is worth: this part of it, spent on new tokens, reaches the same loss.
    worth = budget("--law", "besiroglu", "--flops", 1e22 * said["data"]["worth"])
    assert worth["chosen"]["loss"] == pytest.approx(said["chosen"]["loss"], rel=1e-9)
    assert said["run"]["tokens"] == pytest.approx(said["chosen"]["tokens"], rel=0.03)


def test_tokens_that_the_law_was_told_of_are_those_available(budget, tmp_path):
    numbers = {"A": 521.0, "B": 1488.0, "E": 1.87, "alpha": 0.35266, "beta": 0.35266, "R_D": 15.39, "R_N": 5.31}
    said = []
    for unique, flags in ((0.0, ("--tokens-available", 1e9)), (1e9, ())):
        path = tmp_path / f"{unique:g}.json"
        law_file(path, **numbers, unique_tokens=unique)
        path.write_text(path.read_text().replace("parametric", "data_constrained"))
        said.append(budget("--law", path, "--flops", 1e21, *flags))
    assert said[0]["chosen"] == said[1]["chosen"] and said[0]["best"] == said[1]["best"] and said[0]["data"] == said[1]["data"]
    assert said[0]["best"]["tokens"] > 10 * 1e9


def test_a_law_that_pays_for_inference_is_not_asked_to_pay_twice(budget, tmp_path):
    path = tmp_path / "law.json"
    law_file(path, A=482.0, B=2085.0, E=1.8, alpha=0.348, beta=0.366, inference_tokens=1e12)
    path.write_text(path.read_text().replace("parametric", "inference_aware"))
    assert budget("--law", path, "--flops", 1e21)["chosen"]["params"] < 1e9
    for flag in ("--inference-tokens", "--tokens-available"):
        with pytest.raises(UserError, match=f"{flag}: the budget of --law pays for 1T tokens of inference; leave it out."):
            budget("--law", path, "--flops", 1e21, flag, 1e12)


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"beta": 0.0}, {"A": 0.0}, {"A": math.nan}])
def test_a_file_of_a_law_that_has_no_best_model_is_refused(budget, tmp_path, wrong):
    law = law_file(tmp_path / "law.json", **({"A": 482.0, "B": 2085.0, "E": 1.8, "alpha": 0.348, "beta": 0.366} | wrong))
    with pytest.raises(UserError, match="law.json is not what plan.py fit --out writes"):
        budget("--law", law, "--flops", 1e20)


def test_enough_tokens_change_nothing(budget):
    limited = budget("--flops", 1e20, "--tokens-available", 1e12)
    assert limited["chosen"] == budget("--flops", 1e20)["chosen"] and limited["data"]["epochs"] < 1


# Intervals


def test_the_interval_of_a_fitted_law_is_the_quantiles_of_its_resamples(budget, tmp_path):
    draw = np.random.default_rng(0)
    samples = [
        {"A": 482 * math.exp(0.1 * a), "B": 2085 * math.exp(0.1 * b), "E": 1.8 + 0.02 * e, "alpha": 0.348, "beta": 0.366}
        for a, b, e in draw.normal(size=(200, 3))
    ]
    law = law_file(tmp_path / "law.json", samples, A=482.0, B=2085.0, E=1.8, alpha=0.348, beta=0.366)
    said = budget("--law", law, "--flops", 1e21)["chosen"]
    ratio = [(0.348 * s["A"] / (0.366 * s["B"])) ** (1 / 0.714) for s in samples]
    params = np.array(ratio) * (1e21 / 6) ** (0.366 / 0.714)
    losses = [s["E"] + s["A"] / n**0.348 + s["B"] / (1e21 / 6 / n) ** 0.366 for s, n in zip(samples, params, strict=True)]
    assert said["intervals"]["params"] == pytest.approx(np.quantile(params, [0.025, 0.975]))
    assert said["intervals"]["tokens"] == pytest.approx(np.quantile(1e21 / 6 / params, [0.025, 0.975]))
    assert said["intervals"]["loss"] == pytest.approx(np.quantile(losses, [0.025, 0.975]))
    assert "200 resamples" in said["interval_is"]
    limited = budget("--law", law, "--flops", 1e21, "--tokens-available", 5e9)["chosen"]
    assert limited["intervals"]["loss"][0] > said["intervals"]["loss"][0]


def test_the_interval_from_a_published_standard_error_is_about_the_bootstraps(budget):
    """A bootstrap of 2,000 on the published points has 51.5 to 111 B."""
    low, high = budget("--flops", 5.76e23)["chosen"]["intervals"]["params"]
    assert low == pytest.approx(51.5e9, rel=0.1) and high == pytest.approx(111e9, rel=0.1)


def test_the_published_table_has_the_interval_of_its_exponent(budget):
    """At 8.3e19 x 1e4 FLOP, exponents 0.01 below and 0.004 above the estimate are factors of 1e4^-0.01 and 1e4^0.004."""
    said = budget("--law", "chinchilla-1", "--flops", 8.3e23)["chosen"]
    low, high = said["intervals"]["params"]
    assert low / said["params"] == pytest.approx(10**-0.04) and high / said["params"] == pytest.approx(10**0.016)
    assert "10th to 90th percentile" in said["interval_is"]


def test_a_law_without_a_published_interval_says_so(budget, tmp_path):
    for law, words in (("chinchilla-3", "0.454 to 0.455"), ("muennighoff", "none is published")):
        said = budget("--law", law, "--flops", 1e21)["chosen"]
        assert said["intervals"] == {} and words in said["interval_is"]
    bare = law_file(tmp_path / "bare.json", A=482.0, B=2085.0, E=1.8, alpha=0.348, beta=0.366)
    assert "without a bootstrap" in budget("--law", bare, "--flops", 1e21)["chosen"]["interval_is"]


# Batch and learning rate


@pytest.mark.parametrize(("params", "lr", "batch"), [(7e9, 4.2e-4, 2304 * 4096), (67e9, 3.2e-4, 4608 * 4096)])
def test_deepseeks_rule_gives_what_deepseek_trained_with(params, lr, batch):
    """DeepSeek LLM (2024), table 2: both models saw 2e12 tokens."""
    run = recipe.Run(6 * params * 2e12, params, 2e12, math.nan)
    assert recipe.RULES["deepseek"].lr(run) == pytest.approx(lr, rel=0.02)
    assert recipe.RULES["deepseek"].batch_tokens(run) == pytest.approx(batch, rel=0.03)


def test_step_law_and_kaplans_rule_by_hand():
    run = recipe.Run(6e20, 1e9, 1e11, 3.0)
    assert recipe.RULES["steplaw"].lr(run) == pytest.approx(1.63e-3, rel=2e-3)
    assert recipe.RULES["steplaw"].batch_tokens(run) == pytest.approx(1.11e6, rel=5e-3)
    assert recipe.RULES["kaplan"].lr(run) == pytest.approx(3.48e-4, rel=2e-3)
    assert recipe.RULES["kaplan"].batch_tokens(run) == pytest.approx(1.07e6, rel=5e-3)


def test_the_chosen_rule_decides_the_config(budget):
    for rule, last in (("deepseek", 0.1), ("steplaw", 1e-5), ("kaplan", 0.0)):
        said = budget("--flops", 1e20, "--rule", rule)
        config, advice = said["config"], said["rules"][rule]
        assert set(said["rules"]) == {"deepseek", "steplaw", "kaplan"}
        assert config["optimizer"]["lr"] == pytest.approx(advice["lr"], rel=0.01)
        tokens = config["train"]["batch_size"] * config["train"]["seq_len"]
        assert tokens == pytest.approx(advice["batch_tokens"], rel=1 / 16)
        ends = config["schedule"]["min_lr_ratio"] * (1 if rule == "deepseek" else config["optimizer"]["lr"])
        assert ends == pytest.approx(last, rel=0.01)


@given(rows=st.floats(0.01, 1e5), gpus=st.integers(0, 4096))
@settings(deadline=None)
def test_a_batch_can_be_shared_out(rows, gpus):
    batch = proposal.divisible(rows, gpus)
    assert batch >= 1 and (abs(batch / rows - 1) <= 1 / 16 or abs(batch - rows) <= 1)
    odd = next(d for d in range(gpus or 1, 0, -1) if (gpus or 1) % d == 0 and d % 2)
    if rows >= max(64, 8 * odd):
        assert batch % odd == 0 and batch % (4 if odd == 1 else 1) == 0


# Budgets of accelerators


def test_gpu_hours_are_flops_by_the_peak_and_the_mfu(budget):
    said = budget("--gpu-hours", 1e6, "--mfu", 0.5)
    assert said["budget"]["flops"] == pytest.approx(1e6 * 3600 * 989e12 * 0.5)
    time = said["time"]
    assert time["gpu_hours"] == pytest.approx(1e6 * said["run"]["flops"] / said["budget"]["flops"])
    assert time["dollars"] == pytest.approx(time["gpu_hours"] * accelerators.accelerator("h100").price)
    assert 1.0 < said["run"]["flops"] / said["budget"]["flops"] < 1.15  # attention
    assert budget("--gpu-hours", 1e6)["budget"]["flops"] == pytest.approx(1e6 * 3600 * 989e12 * 0.4)
    assert budget("--gpu", "a100", "--flops", 1e21)["time"]["gpu_hours"] > 1e21 / (312e12 * 0.4 * 3600)


def test_the_layout_takes_the_time_that_is_said_and_train_py_takes_the_layout(budget, tmp_path):
    file = tmp_path / "plan.toml"
    said = budget("--flops", 1e20, "--gpu", "h100", "--gpus", 8, "--out", file)
    layout, time = said["layout"], said["time"]
    assert layout["memory_bytes"] < accelerators.accelerator("h100").memory_bytes
    seconds = said["run"]["steps"] * layout["seconds"]
    assert time["gpu_hours"] == pytest.approx(8 * seconds / 3600, rel=1e-6) and time["mfu"] == layout["mfu"]
    assert time["days"] == pytest.approx(seconds / 86400, rel=1e-6)
    config, plugins = configs.load(file)
    planned = parallel.plan(config, plugins, World(0, 0, 8, torch.device("cpu")), preview.shape(config))
    assert planned.data_size * planned.sizes["tensor"] * planned.sizes["pipeline"] == 8
    assert config.train.micro_batch_size == layout["micro_batch_size"]
    assert budget("--flops", 1e20, "--gpus", 8, "--mfu", 0.3)["time"]["mfu"] == 0.3


def test_a_big_run_is_split_and_its_vocabulary_with_it(budget):
    said = budget("--gpus", 1024, "--hours", 1000, "--vocab-size", 50300)
    tensor = said["layout"]["sizes"]["tensor"]
    assert tensor > 1 and said["model"]["vocab_size"] % (128 * tensor) == 0 and said["model"]["vocab_size"] >= 50300
    assert said["model"]["parameters"]["total"] == pytest.approx(said["chosen"]["params"], rel=0.01)


# The config


@pytest.mark.parametrize(
    ("family", "flops"),
    [("llama", 1e13), ("llama", 1e19), ("llama", 1e24), ("gpt2", 1e19), ("bert", 1e13), ("modern_encoder", 1e16), ("t5", 1e19)],
)
def test_train_py_takes_the_config_and_builds_the_model_of_the_plan(budget, tmp_path, family, flops):
    file = tmp_path / "plan.toml"
    said = budget("--flops", flops, "--family", family, "--out", file)
    config, _ = configs.load(file)
    c = config.train
    assert c.steps * c.batch_size * c.seq_len == said["run"]["tokens"]
    assert said["run"]["tokens"] == pytest.approx(flops / 6 / said["model"]["parameters"]["total"], rel=0.03)
    assert c.batch_size % c.micro_batch_size == 0 and 2 * config.schedule.warmup_steps < c.steps

    class Vocabulary:
        n_vocab = getattr(config.tokenizer, "vocab_size", 361) if config.tokenizer.name == "bpe" else 361

    if flops < 1e24:  # the largest takes seconds to build, even without its numbers
        with torch.device("meta"):
            model = build_model(config, Vocabulary())
        assert sum(p.numel() for p in model.parameters()) == said["model"]["parameters"]["total"]


@pytest.mark.slow
@pytest.mark.parametrize("flops", [1e11, 1e12])
def test_a_tiny_plan_is_trained_as_planned(budget, capsys, tmp_path, text_folder, cache_folder, flops):
    file, text = tmp_path / "tiny.toml", f"{text_folder}/*.txt"
    said = budget("--law", "chinchilla-1", "--flops", flops, "--corpus", text, "--out", file)
    train.main([str(file), "--print-config"])
    assert f"d_model = {said['model']['d_model']}\n" in capsys.readouterr().out
    flags = [f"--out_dir={tmp_path}/runs", f"--data.cache_dir={cache_folder}", "--train.samples=0", "--train.device=cpu"]
    trained = run_script("train.py", file, *flags, timeout=300)
    assert trained.returncode == 0, trained.stderr
    assert f"{said['model']['parameters']['total']:,} parameters" in trained.stdout
    steps, _ = read_log(tmp_path / "runs" / said["config"]["name"])
    assert len(steps) == said["run"]["steps"] and steps[-1]["tokens"] == said["run"]["tokens"]
    assert 6 * said["model"]["parameters"]["total"] * steps[-1]["tokens"] == pytest.approx(flops, rel=0.1)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]


# What a user reads, and types


def test_the_text_says_what_the_numbers_rest_on(capsys):
    plan.main(
        ["budget", "--gpus", "1", "--gpu-hours", "1000", "--law", "besiroglu", "--tokens-available", "1e9", "--gpu", "h200"]
    )
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "MFU of 0.40, an assumption", "nats a token", "each seen", "Muennighoff", "Kaplan et al., 2020, section 3.2",
        "deepseek: rate", "steplaw: rate", "kaplan: rate", "other laws: chinchilla-1", "neither a law of the wrong form",
        "US dollars", "times 6 N D",
    ):  # fmt: skip
        assert words in said
    plan.main(["budget", "--flops", "1e12"])
    said = " ".join(capsys.readouterr().out.split())
    assert "No such loss exists: guessing among 384 tokens costs 5.95" in said and "times smaller than the smallest" in said


@pytest.mark.parametrize(("gpus", "nodes", "each"), [(8, 0, 8), (12, 2, 6), (16, 2, 8)])
def test_the_command_starts_a_process_on_each_gpu(capsys, tmp_path, gpus, nodes, each):
    plan.main(["budget", "--flops", "1e20", "--gpus", str(gpus), "--out", str(tmp_path / "run.toml")])
    command = capsys.readouterr().out.splitlines()[-1]
    several = f" --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500" if nodes else ""
    assert command == f"torchrun{several} --nproc-per-node={each} train.py {tmp_path / 'run.toml'}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "no budget; say one of --flops, --params, --gpu-hours, or --gpus with --hours."),
        ("--flops 1e20 --gpu-hours 100", "--flops and --gpu-hours: each is a budget; say only one of"),
        ("--flops 1e20 --hours 10 --gpus 8", "--flops and --hours: each is a budget"),
        ("--hours 100", "--hours: of how many GPUs? Say --gpus too, or --gpu-hours instead."),
        ("--gpus 8", "no budget; say one of"),
        ("--flops -5", "argument --flops: -5 must be above 0 and finite"),
        ("--flops=-1e20", "argument --flops: -1e20 must be above 0 and finite"),
        ("--flops 0", "argument --flops: 0 must be above 0 and finite"),
        ("--flops nan", "argument --flops: nan must be above 0 and finite"),
        ("--flops inf", "argument --flops: inf must be above 0 and finite"),
        ("--flops much", "argument --flops: invalid number value: 'much'"),
        ("--flops", "argument --flops: expected one argument"),
        ("--flops 1e20 --gpus 1.5", "argument --gpus: invalid whole number value: '1.5'"),
        ("--gpu-hours 10 --mfu 40", "--mfu 40: must be at most 1, a part of the peak."),
        ("--gpu-hours 10 --gpu h10", "--gpu h10: no such accelerator; did you mean h100?"),
        ("--flops 1e20 --family lama", "--family lama: there is none of this name; did you mean llama?"),
        ("--flops 1e20 --rule stepslaw", "--rule stepslaw: there is none of this name; did you mean steplaw?"),
        ("--flops 1e20 --law chinchila-1", "--law: chinchila-1 is neither a published law nor a file of one; did you mean"),
        ("--flops 1e20 --law chinchilla-1 --rule kaplan", "--rule kaplan: its batch follows from the loss, which"),
        (
            "--flops 1e24 --rule kaplan",
            "--rule kaplan: it has no learning rate beyond 1e10 parameters; take deepseek or steplaw.",
        ),
        ("--flops 1e20 --law chinchilla-1 --tokens-available 1e9", "needs a law of the form E + A/N^alpha + B/D^beta"),
        ("--flops 1e20 --law chinchilla-1 --inference-tokens 1e9", "--inference-tokens: needs a law of the form"),
        ("--flops 1e20 --inference-tokens 1e12 --tokens-available 1e9", "no law covers both; leave one of the two out."),
        ("--flops 1e20 --vocab-size 100", "--vocab-size 100: must be at least 361, the bytes and the special tokens."),
        ("--flops 1e9", "parameters are too few for the family llama, whose smallest model here has 27,232"),
        ("--flops 1e15 --vocab-size 100000", "it takes a larger budget, or a smaller --vocab-size."),
        ("--flops 1e60", "a budget of 1e+60 FLOP: must be at most 1e+35."),
        ("--gpu-hours 1e300", "a budget of inf FLOP: must be at most 1e+35."),
        ("--params 1e80", "--params 1e+80: must be between 0.0477 and 4.17e+16, the best for 1 and for 1e+35 FLOP."),
        ("--flops 1e20 --inference-tokens 1e300", "--inference-tokens 1e+300: must be at most 5.86e+25 here."),
        ("--flops 1e20 --flop 1e20", "--flop: not an option; did you mean --flops?"),
        (
            "--flops 5e23 --gpus 2",
            "--gpus 2: no layout of 67.3B parameters fits on so many h100; of those that were tried: it takes",
        ),
        ("--flops 1e20 --out /dev/null/x.toml", "/dev/null/x.toml: can't be written"),
    ],
)
def test_what_can_not_be_planned_is_refused_in_one_sentence(flags, message):
    with pytest.raises(UserError) as error:
        plan.main(["budget", *flags.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
