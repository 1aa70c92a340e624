"""plan.py memory and layout: estimates against torch's own accounting, against measured runs of others, and against the checks
that train.py makes."""

from __future__ import annotations

import csv
import dataclasses
import json
from itertools import accumulate, pairwise
from statistics import median

import pytest
import torch
from conftest import ROOT, SHARED, run_script
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from nanopre import UserError, config as configs, cost, distributed, machine, optim, parallel
from nanopre.accelerators import accelerator
from nanopre.distributed import World
from nanopre.planning import layouts, memory, preview

H100 = accelerator("h100")


def plan(table: dict, gpus: int):
    """(config, layout, model, a row of its batches)."""
    config, plugins = configs.from_dict(table, "test")
    model = preview.shape(config)
    layout = parallel.plan(config, plugins, World(0, 0, gpus, torch.device("cpu")), model)
    return config, layout, model, preview.example(config)


# Peaks, measured on this machine.


class Vocabulary:
    def __init__(self, n: int):
        self.n_vocab = n


class Totals(dict):
    """What sums of losses are divided by."""

    def __missing__(self, key):
        return torch.tensor(1000.0)


def measure(table: dict) -> tuple[tuple[int, int, int], memory.Stage]:
    """(bytes of parameters, of optimizer states, at the peak of a whole step) of this rank, by torch's accounting; and the
    estimate."""
    with distributed.start(torch.device("cpu")) as world:
        config, plugins = configs.from_dict(table, "test")
        layout = parallel.plan(config, plugins, world)
        model = distributed.build_model(config, Vocabulary(preview.vocabulary(config)[0]))
        here, example = machine.choose(config.train), preview.example(config)
        rows = config.train.batch_size // layout.data_size
        batch = {key: t.expand(rows, *t.shape[1:]).contiguous() for key, t in example.items()}
        parts, engine = parallel.apply(layout, model, here, config.objective.loss, config, example)
        del model
        optimizers = [o for part in parts for o in optim.build(config.optimizer, part)]

        def step() -> None:
            engine.forward_backward(batch, Totals())
            parallel.finish_gradients(layout, parts)
            parallel.clip_gradients(layout, parts, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step()
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]

        def nbytes(tensors) -> int:
            return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

        weights = nbytes(p for part in parts for p in part.parameters())
        states = nbytes(t for o in optimizers for s in o.state.values() for t in s.values() if t.dim())
        products = 2 if here.precision == torch.bfloat16 else 4
        estimate = memory.estimate(config, layout, preview.shape(config), example, "cpu", products)
        return (weights, states, weights + states + max(accumulate(sizes))), estimate[layout.rank("pipeline")]


def check(measured: tuple[int, int, int], estimate: memory.Stage) -> None:
    weights, states, peak = measured
    assert (weights, states) == pytest.approx((estimate.parameters, estimate.states))
    assert estimate.peak == pytest.approx(peak, rel=0.1)


FAMILIES = {
    "gpt2": ({"name": "gpt2"}, "clm"),
    "llama": ({"name": "llama", "n_kv_heads": 2}, "clm"),
    "bert": ({"name": "bert"}, "mlm_nsp"),
    "t5": ({"name": "t5", "d_head": 32}, "span_corruption"),
}
SIZES = {  # activations have most of the first, the vocabulary of the second, weights of the third
    "long": ({"d_model": 128, "n_layers": 3}, 1024, {"batch_size": 4, "seq_len": 256}),
    "wide vocabulary": ({"d_model": 64, "n_layers": 4}, 8192, {"batch_size": 8, "micro_batch_size": 2, "seq_len": 128}),
    "short": ({"d_model": 256, "n_layers": 3}, 2048, {"batch_size": 2, "seq_len": 64}),
}


def table_of(family: str, size: str, precision: str, parallel: dict) -> dict:
    (model, objective), (sizes, n_vocab, train) = FAMILIES[family], SIZES[size]
    return {
        "model": {**model, "n_heads": 4, **sizes},
        "objective": {"name": objective},
        "tokenizer": {"vocab_size": n_vocab},
        "train": {**train, "precision": precision, "device": "cpu", "compile": "off"},
        "parallel": parallel,
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "size, precision, mode",
    [
        ("long", "bfloat16", "none"),
        ("long", "float32", "selective"),
        ("wide vocabulary", "bfloat16", "full"),
        ("short", "bfloat16", "none"),
    ],
)
def test_the_peak_of_a_step_is_within_ten_percent(family, size, precision, mode):
    check(*measure(table_of(family, size, precision, {"activation_checkpointing": {"mode": mode}})))


LAYOUTS = {
    "ddp": (2, {"ddp": {}}),
    "fsdp, stage 2": (2, {"fsdp": {"reshard_after_forward": False}}),
    "fsdp": (2, {"fsdp": {}}),
    "tensor": (2, {"tensor": {"degree": 2}}),
    "sequence": (2, {"tensor": {"degree": 2, "sequence_parallel": True}}),
    "1f1b": (2, {"pipeline": {"microbatches": 4}}),
    "gpipe": (2, {"pipeline": {"microbatches": 4, "schedule": "gpipe"}}),
    "interleaved": (2, {"pipeline": {"microbatches": 4, "schedule": "interleaved_1f1b"}}),
    "zero bubble": (2, {"pipeline": {"microbatches": 4, "schedule": "zero_bubble"}}),
    "fsdp x pipeline": (4, {"fsdp": {}, "pipeline": {"microbatches": 4}}),
    "ddp x pipeline": (4, {"ddp": {}, "pipeline": {"microbatches": 4}}),
    "ddp x tensor": (4, {"ddp": {}, "tensor": {"degree": 2}}),
}
QUICK = ("fsdp", "sequence")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS])
def test_each_rank_of_a_layout_is_within_ten_percent(name, ranks):
    n, layout = LAYOUTS[name]
    table = {
        "model": {"name": "llama", "d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2},
        "tokenizer": {"vocab_size": 1024},
        "train": {"batch_size": 8, "seq_len": 256, "precision": "float32", "device": "cpu", "compile": "off"},
        "parallel": layout,
    }
    for result, _, error in ranks.run(n, measure, table):
        assert error is None, error
        check(*result)


# Weights and states.


def test_ten_billion_parameters_in_pure_bfloat16_are_four_times_twenty_gigabytes():
    table = {
        "model": {"name": "gpt2", "d_model": 5120, "n_layers": 31, "n_heads": 40, "vocab_size": 50304},
        "train": {"batch_size": 1, "seq_len": 2048, "weights": "bfloat16"},
    }
    config, layout, model, example = plan(table, 1)
    assert cost.parameters(model.config)["total"] == pytest.approx(10e9, rel=0.01)
    weights = memory.Weights(model, 1, 1, lambda kind, n: 2 * 2 * n)
    [stage] = memory.estimate(config, layout, model, example, weights=weights)
    assert [stage.parameters, stage.gradients, stage.states] == pytest.approx([20e9, 20e9, 40e9], rel=0.01)
    assert stage.parameters + stage.gradients + stage.states == pytest.approx(80e9, rel=0.01)
    [stage] = memory.estimate(config, layout, model, example)  # our AdamW keeps float32 moments
    assert stage.states == pytest.approx(80e9, rel=0.01)
    # Mixed precision with float32 weights: 16 bytes a parameter (Rajbhandari et al., 2020, section 3.1).
    config.train.weights = "float32"
    [stage] = memory.estimate(config, layout, model, example)
    assert stage.parameters + stage.gradients + stage.states == pytest.approx(160e9, rel=0.01)


@pytest.mark.parametrize("optimizer, per_number", [("adamw", 8), ("adamw8bit", 2 + 8 / 256), ("muon", 4)])
def test_states_are_those_of_the_optimizer(optimizer, per_number):
    """Of the matrices of blocks, which are nearly all of this model."""
    model = {"name": "gpt2", "d_model": 2048, "n_layers": 48, "n_heads": 16, "vocab_size": 64}
    config, layout, shape, example = plan({"model": model, "optimizer": {"name": optimizer}}, 1)
    [stage] = memory.estimate(config, layout, shape, example)
    assert stage.states == pytest.approx(stage.parameters / 4 * per_number, rel=0.002)


def test_zero_s_stages_divide_what_they_say():
    """DDP holds 16 bytes a parameter, FSDP a share of them; sharding in smaller groups divides by their size."""
    table = {"model": {"name": "gpt2"}, "train": {"batch_size": 64}, "tokenizer": {"name": "gpt2"}}
    sums = []
    for strategy in ({"ddp": {}}, {"fsdp": {}}, {"fsdp": {"degree": 4}}):
        [stage] = memory.estimate(*plan({**table, "parallel": strategy}, 64))
        sums.append(stage.parameters + stage.gradients + stage.states)
    # As published, with 50,368 tokens in place of 50,257, and 256 positions in place of 1,024.
    assert sums[0] == 16 * (124_439_808 + (111 - 768) * 768)
    assert sums[1:] == pytest.approx([sums[0] / 64, sums[0] / 4])


# Measured runs of others: MosaicML's llm-foundry on H100s.


@pytest.fixture(scope="module")
def measured_rows():
    """(row, config, layout, model, a row of its batches) of each."""
    folder = SHARED / "scaling"
    if not folder.exists():
        pytest.skip("the measured runs are not beside the checkout")
    with open(folder / "mpt_configs.csv", newline="") as file:
        shapes = {row["model"]: row for row in csv.DictReader(file)}
    with open(folder / "mpt_h100_measured.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    strategies = {"fsdp": {"param_dtype": "bfloat16"}, "activation_checkpointing": {}}
    base, plugins = configs.from_dict({"model": {"name": "gpt2"}, "parallel": strategies}, "test")
    models, result = {}, []
    for row in rows:
        micro, gpus, T = int(row["microbatchsize"]), int(row["n_gpus"]), int(row["seqlen_t"])
        sizes = {key: int(shapes[row["model"]][key]) for key in ("d_model", "n_layers", "n_heads", "vocab_size")}
        batch = micro * gpus * int(row["gradaccum"])
        train = dataclasses.replace(base.train, batch_size=batch, micro_batch_size=micro, seq_len=T)
        full = row["sharding_strategy"] == "FULL_SHARD"
        strategies = {**base.parallel, "fsdp": dataclasses.replace(base.parallel["fsdp"], reshard_after_forward=full)}
        if row["activation_checkpointing"] == "False":
            del strategies["activation_checkpointing"]
        config = dataclasses.replace(base, model=dataclasses.replace(base.model, **sizes), train=train, parallel=strategies)
        key = row["model"], T
        model = models[key] = models.get(key) or preview.shape(config)
        layout = parallel.plan(config, plugins, World(0, 0, gpus, torch.device("cpu")), model)
        result.append((row, config, layout, model, preview.example(config)))
    assert len(result) == 70
    return result


def test_the_mfu_of_measured_runs_follows_from_the_count(measured_rows):
    """To 0.1 points, with the parameters that the rows count: all of them, positions, norms and biases too (Chowdhery et al.,
    2022, appendix B: 6 N + 12 L H Q T). Our own count leaves out what no token is multiplied with, and is less by just that."""
    for row, _, _, model, _ in measured_rows:
        c = model.config
        assert cost.parameters(c)["total"] == int(row["numparams"])
        others = (c.seq_len + 13 * c.n_layers + 2) * c.d_model  # positions, norms, biases
        flops = cost.flops_per_token(c, c.seq_len) + 6 * others
        mfu = 100 * flops * float(row["throughput_t_per_s_per_gpu"]) / H100.peak_flops
        assert mfu == pytest.approx(float(row["mfu"]), abs=0.1), row


def test_measured_runs_fit_and_most_of_twice_their_micro_batch_do_not(measured_rows):
    fit, twice = [], []
    for _, config, *rest in measured_rows:
        for times, result in ((1, fit), (2, twice)):
            batch, micro = times * config.train.batch_size, times * config.train.micro_batch_size
            train = dataclasses.replace(config.train, batch_size=batch, micro_batch_size=micro)
            [stage] = memory.estimate(dataclasses.replace(config, train=train), *rest)
            result.append(stage.peak <= H100.memory_bytes)
    assert sum(fit) >= 0.95 * len(fit)
    assert sum(twice) <= 0.25 * len(twice)


def test_measured_runs_take_about_the_time_that_is_predicted(measured_rows):
    """With one efficiency for models of 0.8 to 65 billion parameters and 512 to 65,536 tokens, 7 of 10 within a quarter."""
    ratios = []
    for row, config, layout, model, example in measured_rows:
        weights = memory.Weights(model, 1, layout.sizes["shard"], memory.two_moments)
        parts = layouts.step_time(config, layout, model, example, weights, H100, layouts.EFFICIENCY)
        tokens = config.train.batch_size * config.train.seq_len
        measured = tokens / float(row["throughput_t_per_s_per_gpu"]) / int(row["n_gpus"])
        ratios.append(sum(parts.values()) / measured)
    assert median(ratios) == pytest.approx(1, abs=0.03)
    assert sum(0.8 <= ratio <= 1.25 for ratio in ratios) >= 0.7 * len(ratios)


# The search.

SMALL = {
    "model": {"name": "llama", "d_model": 1024, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "vocab_size": 32_000},
    "train": {"batch_size": 32, "seq_len": 2048},
}


@pytest.fixture(scope="module")
def found():
    config, plugins = configs.from_dict(SMALL, "test")
    return layouts.search(config, plugins, H100, 8)


def test_the_best_is_first_and_all_fit(found):
    assert len(found.ranked) > 100 and len(found.refused) > 100
    seconds = [c.seconds for c in found.ranked]
    assert seconds == sorted(seconds)
    for c in found.ranked:
        assert c.sizes["pipeline"] * c.sizes["data"] * c.sizes["tensor"] == 8
        assert c.memory_bytes <= H100.memory_bytes and c.seconds == pytest.approx(sum(c.parts.values()))
        assert 0 < c.mfu <= layouts.EFFICIENCY
    assert {c.sizes["tensor"] for c in found.ranked} == {1, 2, 4}  # 8 does not divide the heads of keys


def test_of_layouts_that_take_as_long_the_larger_micro_batch_comes_first():
    """120 rows a rank, by 1 to 120 at a time: sums of as much work in other portions differ in their last digits."""
    config, plugins = configs.from_dict(SMALL | {"train": {"batch_size": 240, "seq_len": 512}}, "test")
    ranked = layouts.search(config, plugins, H100, 2).ranked
    alike = [(a, b) for a, b in pairwise(ranked) if a.seconds == pytest.approx(b.seconds, rel=1e-12)]
    assert len(alike) > 10 and all(a.micro_batch_size >= b.micro_batch_size for a, b in alike)


def test_train_py_takes_what_is_ranked_and_refuses_what_is_refused_in_the_same_words(found):
    def refusal(c) -> str | None:
        table = {**SMALL, "train": {**SMALL["train"], "micro_batch_size": c.micro_batch_size}, "parallel": c.parallel}
        try:
            plan(table, 8)
        except UserError as error:
            return str(error)
        return None

    assert all(refusal(c) is None for c in found.ranked[::40])
    of_checks = [r for r in found.refused if not r.reason.startswith("it takes")]
    assert all(refusal(r) == r.reason for r in of_checks[::40])
    reasons = found.reasons()
    assert sum(n for _, n in reasons) == len(found.refused)
    assert any("parallel.tensor: degree = 8 does not divide n_kv_heads = 4" in reason for reason, _ in reasons)
    assert any("zero_bubble needs" in reason for reason, _ in reasons)


def test_a_slower_network_never_helps_and_costs_those_who_use_it():
    config, plugins = configs.from_dict(SMALL, "test")
    slow = type(H100)(**{**vars(H100), "node_bandwidth": H100.node_bandwidth / 10})
    before, after = (
        {json.dumps([c.parallel, c.micro_batch_size]): c for c in layouts.search(config, plugins, gpu, 8).ranked}
        for gpu in (H100, slow)
    )
    assert before.keys() == after.keys()
    for key, c in before.items():
        assert after[key].seconds >= c.seconds
        assert after[key].parts["tensor"] == pytest.approx(10 * c.parts["tensor"])
        assert after[key].parts["pipeline"] == pytest.approx(10 * c.parts["pipeline"])
        assert (c.parts["tensor"] > 0) == (c.sizes["tensor"] > 1) and (c.parts["bubble"] > 0) == (c.sizes["pipeline"] > 1)


def test_the_parts_of_a_step_are_the_closed_forms():
    strategies = {"tensor": {"degree": 2, "sequence_parallel": True}, "pipeline": {"degree": 4, "microbatches": 16}}
    table = {**SMALL, "train": {**SMALL["train"], "micro_batch_size": 2}, "parallel": strategies}
    table["model"] = {**SMALL["model"], "vocab_size": 64}  # two blocks on each rank, and the head makes the last one slowest
    config, layout, model, example = plan(table, 8)
    weights = memory.Weights(model, 2, 1, memory.two_moments)
    parts = layouts.step_time(config, layout, model, example, weights, H100, 0.5)
    n_blocks, stream = 2, 2 * 2048 * 1024  # a micro-batch's tokens, d_model
    # Per block: attention and MLP each gather and scatter once in each direction, float32 and bfloat16 by turns, half of it
    # from each of two ranks; the last stage also sums the gradient of what the head reads, in float32.
    sent = 16 * (n_blocks * 2 * 2 * (4 + 2) + 8) * stream / 2
    assert parts["tensor"] == pytest.approx(sent / H100.node_bandwidth)
    micro = (parts["compute"] + parts["tensor"] + parts["pipeline"]) / 16
    assert parts["bubble"] == pytest.approx(3 * micro)  # (p - 1) / m of 16
    assert parts["pipeline"] == pytest.approx(16 * 2 * stream / 2 * 4 / H100.node_bandwidth)  # half of the tokens on a rank
    assert parts["data"] == 0


def test_a_step_s_time_gives_its_efficiency_back():
    config, layout, model, example = plan({**SMALL, "parallel": {"fsdp": {}}}, 8)
    weights = memory.Weights(model, 1, 8, memory.two_moments)
    seconds = sum(layouts.step_time(config, layout, model, example, weights, H100, 0.37).values())
    _, plugins = configs.from_dict(SMALL, "test")
    assert layouts.calibrate(config, plugins, H100, 8, seconds, "test") == pytest.approx(0.37, rel=1e-6)
    with pytest.raises(UserError, match="test: its steps of 1e-06 s are shorter than 8 of these GPUs could make them"):
        layouts.calibrate(config, plugins, H100, 8, 1e-6, "test")


# What a user types.


def plan_py(capsys, *arguments) -> str:
    import plan

    plan.main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_memory_as_a_user_asks_for_it(capsys):
    flags = [ROOT / "configs" / "gpt2-124m.toml", "--gpu", "h100", "--gpus", 8, "--parallel.pipeline.microbatches=10"]
    text = plan_py(capsys, "memory", *flags)
    assert "50,368 (tokenizer.name = \"gpt2\", padded from 50,361)" in text and "rank 1" in text and "GB: fits." in text
    result = json.loads(plan_py(capsys, "memory", *flags, "--json"))
    assert [stage["blocks"] for stage in result["stages"]] == [8, 4] and result["fits"]  # the head costs as much as 4
    bits = json.loads(plan_py(capsys, "memory", *flags, "--state-bits", 16, "--json"))
    assert bits["stages"][0]["states"] == result["stages"][0]["states"] / 2


def test_layout_as_a_user_asks_for_it_and_its_toml_is_taken(capsys, tmp_path):
    flags = [ROOT / "configs" / "default.toml", "--gpu", "mine", "--gpus", 4, "--accelerators", tmp_path / "own.toml"]
    keys = "memory_bytes = 16e9\npeak_flops = 1e12\nmemory_bandwidth = 5e10\nnode_gpus = 4\n"
    (tmp_path / "own.toml").write_text(f'[mine]\ndevice = "x"\n{keys}node_bandwidth = 1e9\nnetwork_bandwidth = 1e9')
    text = plan_py(capsys, "layout", *flags)
    assert "layouts fit 4 GPUs at 0.42 of the peak" in text and "layouts can't be" in text
    toml = tmp_path / "best.toml"
    toml.write_text(text[text.index("[train]") : text.rindex("\n\n")])
    config, plugins = configs.load(toml, ["--train.batch_size=8", "--model.n_layers=4"])
    assert parallel.plan(config, plugins, World(0, 0, 4, torch.device("cpu"))).world.size == 4
    result = json.loads(plan_py(capsys, "layout", *flags, "--json"))
    assert len(result["refused"]) == sum(reason["layouts"] for reason in result["reasons"]) > 0

    # A run of this machine, as if on one such GPU.
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text((ROOT / "configs" / "default.toml").read_text())
    (run / "log.jsonl").write_text("".join(
        json.dumps({"step": i, "tokens": 2048 * i, "tokens_per_second": 10_000}) + "\n" for i in range(1, 10)
    ))  # fmt: skip
    result = json.loads(plan_py(capsys, "layout", *flags, "--calibrate", run, "--json"))
    c = preview.shape(configs.load(run / "config.toml")[0]).config
    assert result["efficiency"] == pytest.approx(10_000 * cost.flops_per_token(c, 256) / 1e12, rel=0.1)


def test_schedule_as_a_user_asks_for_it(capsys, tmp_path):
    text = plan_py(capsys, "schedule", "--schedule", "zero_bubble", "--png", tmp_path / "new" / "a.png")
    assert text.rstrip("\n") in (ROOT / "docs" / "parallel.md").read_text().replace("`zero_bubble`", "zero_bubble").replace(
        "8, 8, 8, 8\n\n```\n", "8, 8, 8, 8\n\n"
    )
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads(plan_py(capsys, "schedule", "--stages", 3, "--microbatches", 6, "--json"))
    assert result["bubble"] == pytest.approx(2 / 8) and result["held"] == [3, 2, 1]
    assert len(result["ranks"]) == 3 and len(result["ranks"][0]) == 12


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["memory", "CONFIG", "--gpu", "h10"], "--gpu h10: no such accelerator; did you mean h100?"),
        (["memory", "CONFIG", "--gpu", "h100", "--gpus", "0"], "argument --gpus: 0 must be at least 1; see --help."),
        (["memory", "CONFIG", "--gpu", "h100", "--gpus", "x"], "argument --gpus: invalid whole number value: 'x'; see --help."),
        (["memory", "CONFIG", "--gpu", "h100", "--gpus", "3"], "train.batch_size = 8 is not divisible by 3"),
        (["memory", "CONFIG", "--gpu", "h100", "--tokenizer.name=chars"], 'tokenizer.name = "chars": how many characters'),
        (["memory", "CONFIG", "--gpu", "h100", "--train.stepz=1"], "--train.stepz: unknown key; did you mean --train.steps?"),
        (["layout", "CONFIG", "--gpu", "h100", "--efficiency", "nan"], "--efficiency nan: it must be above 0 and at most 1."),
        (["layout", "CONFIG", "--gpu", "h100", "--calibrate", "nix"], "nix/config.toml: can't be read"),
        (["layout", "CONFIG", "--gpu", "h100", "--objective.name=sft"], "objective.name = sft: a plan is for pre-training"),
        (["layout", "CONFIG", "--gpu", "h100", "--objective.name=electra"], "objective.name = electra is for an encoder;"),
        (["schedule", "--schedule", "1f2b"], "--schedule 1f2b: there is no such choice; did you mean 1f1b?"),
        (["layuot", "CONFIG"], "COMMAND layuot: there is no such choice; did you mean layout?"),
        (["schedule", "--microbatches", "2"], "parallel.pipeline: 1f1b needs at least as many microbatches as ranks; take 4."),
        (["memory", "CONFIG", "--gpu", "h100", "--train.seq_len=9999999"], "rows of at most 4,194,304 tokens."),
        (["schedule", "--png", "/dev/null/a.png"], "/dev/null/a.png: can't be written ("),
        (["schedule", "--train.steps=1"], "--train.steps: not an option; choose from --help, --json, --microbatches, --png,"),
        (["layout", "CONFIG", "--gpu", "h100", "--gpuss=4"], "--gpuss: not an option (a key is set as"),
        # A misspelt option, not the one that is missing for it; and one that stands before the command.
        (["memory", "CONFIG", "--gpuu=h100"], "--gpuu: not an option (a key is set as --section.key=value); did you mean"),
        (["memory", "CONFIG", "--train.steps"], "--train.steps: no value; write --train.steps=VALUE."),
        (["memory", "CONFIG", "--train.steps=5"], "the following arguments are required: --gpu; see --help."),
        (["budget", "--flops=1e18", "--gpuhours=3"], "--gpuhours: not an option; did you mean --gpu-hours?"),
        (["--jsn", "layout", "CONFIG"], "--jsn: not an option here; those of a COMMAND come after it."),
        (["-json", "layout", "CONFIG"], "-json: not an option here; those of a COMMAND come after it."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, message):
    import plan

    with pytest.raises(UserError) as error:
        plan.main([str(ROOT / "configs" / "default.toml") if a == "CONFIG" else a for a in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_errors_end_with_status_2_and_no_traceback():
    result = run_script("plan.py", "schedule", "--microbatches", 0)
    assert result.returncode == 2 and result.stderr == "plan.py: argument --microbatches: 0 must be at least 1; see --help.\n"
