"""Layouts that are planned, those that are refused, and what the strategies make of a model. That they all compute the same
is proved in test_layouts.py."""

from __future__ import annotations

import math
import os
import re
from itertools import combinations
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import run_script
from hypothesis import given, settings, strategies as st
from torch.torch_version import TorchVersion
from transformers import AutoModelForCausalLM

import train
from nanopre import UserError, checkpoint, config as configs, distributed, hf, optim, parallel
from nanopre.distributed import World
from nanopre.plugins import load_plugins
from nanopre.timetable import share_out

PLUGINS = load_plugins()


def plan(ranks: int, **table) -> parallel.Layout:
    table = {"model": {"name": "llama", "n_layers": 4, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64}, **table}
    config, plugins = configs.from_dict(table, "test")
    return parallel.plan(config, plugins, World(0, 0, ranks, torch.device("cpu")))


def refusal(ranks: int, **table) -> str:
    with pytest.raises(UserError) as error:
        plan(ranks, **table)
    return str(error.value)


@pytest.mark.parametrize(
    "strategies, sentence",
    [
        ({"tensor": {"degree": 0}}, "test: parallel.tensor: degree = 0 must be at least 1."),
        ({"tensor": {"degree": "2"}}, 'test: parallel.tensor.degree: is "2"; it must be a whole number.'),
        ({"tensor": 2}, "test: parallel.tensor: is 2; it must be a section."),
        ({"tensr": {}}, 'test: parallel.tensr: there is no parallel "tensr"; did you mean tensor?'),
        ({"tensor": {"degre": 2}}, "test: parallel.tensor.degre: unknown key; did you mean parallel.tensor.degree?"),
        ({"pipeline": {"microbatches": -8}}, "test: parallel.pipeline: microbatches = -8 must be at least 1."),
        ({"pipeline": {"schedule": "1fb1"}}, 'test: parallel.pipeline.schedule: is "1fb1"; did you mean 1f1b?'),
        ({"fsdp": {"degree": -1}}, "test: parallel.fsdp: degree = -1 must be at least 0."),
        ({"ddp": {"bucket_mb": 0}}, "test: parallel.ddp: bucket_mb = 0 must be at least 1."),
    ],
)
def test_options_that_can_not_be_are_refused(strategies, sentence):
    assert refusal(2, parallel=strategies) == sentence


@pytest.mark.parametrize("before, after", [("interleaved_1f1b", "1f1b"), ("1f1b", "interleaved_1f1b")])
def test_a_schedule_that_comes_later_has_its_own_number_of_stages(before, after):
    """A saved config says what was given, so that a run may go on with another schedule: it has as many stages a rank as if
    it had been the first."""
    config, _ = configs.from_dict({"parallel": {"pipeline": {"schedule": before}}}, "test")
    saved = configs.to_dict(config)
    saved["parallel"]["pipeline"]["schedule"] = after
    assert configs.from_dict(saved, "test")[0].parallel["pipeline"].stages == (2 if after == "interleaved_1f1b" else 1)


# How ranks and batch are shared out.


@pytest.mark.parametrize(
    "ranks, strategies, sizes, order",
    [
        (1, {}, (1, 1, 1, 1), []),
        (1, {"ddp": {}}, (1, 1, 1, 1), []),
        (2, {}, (1, 2, 1, 1), ["ddp"]),
        (4, {"fsdp": {}}, (1, 1, 4, 1), ["fsdp"]),
        (4, {"fsdp": {"degree": 2}}, (1, 2, 2, 1), ["fsdp"]),
        (8, {"fsdp": {}, "tensor": {}, "pipeline": {}}, (2, 1, 2, 2), ["pipeline", "tensor", "fsdp"]),
        (16, {"tensor": {}, "pipeline": {"degree": 4}}, (4, 2, 1, 2), ["pipeline", "tensor", "ddp"]),
        (4, {"tensor": {}, "pipeline": {}, "fsdp": {}}, (2, 1, 1, 2), ["pipeline", "tensor"]),
    ],
)
def test_data_parallelism_takes_the_ranks_that_are_left(ranks, strategies, sizes, order):
    layout = plan(ranks, parallel=strategies)
    assert tuple(layout.sizes[name] for name in parallel.DIMENSIONS) == sizes
    assert list(layout.strategies) == order


@pytest.mark.parametrize(
    "ranks, strategies, message",
    [
        (3, {"tensor": {}}, "parallel: tensor 2 does not divide 3 processes; take 2 or 4 processes "
         "(torchrun --nproc-per-node=4)."),
        (2, {"tensor": {}, "pipeline": {}}, "parallel: pipeline 2 x tensor 2 does not divide 2 processes; take 4 processes "
         "(torchrun --nproc-per-node=4)."),
        (1, {"tensor": {}}, "parallel: tensor 2 does not divide 1 process; take 2 processes (torchrun --nproc-per-node=2)."),
        (2, {"ddp": {}, "fsdp": {}}, "parallel.fsdp: parallel.ddp is the same kind of strategy; leave one of the two out."),
        (4, {"fsdp": {"degree": 3}}, "parallel.fsdp.degree = 3 does not divide the 4 data-parallel ranks; take 2."),
        (4, {"tensor": {"degree": 4}},
         "parallel.tensor: degree = 4 does not divide n_kv_heads = 2; take 2, or n_kv_heads = 4."),
        (8, {"pipeline": {"degree": 8}},
         "parallel.pipeline: 8 stages are more than the model's 4 blocks; take degree = 4."),
        (4, {"pipeline": {"degree": 4, "schedule": "interleaved_1f1b"}},
         "parallel.pipeline: 8 stages are more than the model's 4 blocks; take degree = 2, or stages_per_rank = 1."),
        (2, {"pipeline": {"schedule": "zero_bubble", "stages_per_rank": 5}},
         "parallel.pipeline: 10 stages are more than the model's 4 blocks; take degree = 1, or stages_per_rank = 2."),
        (16, {"tensor": {"degree": 3}}, "parallel: tensor 3 does not divide 16 processes; take 15 or 18 processes "
         "(torchrun --nproc-per-node=18)."),
        (3, {"tensor": {"degree": 3}}, "parallel.tensor: degree = 3 does not divide n_heads = 4; take 1, or n_heads = 6."),
        (8, {"fsdp": {"degree": 2}, "tensor": {"degree": 8}},
         "parallel.fsdp.degree = 2 does not divide the 1 data-parallel rank; take 1."),
        (2, {"pipeline": {"schedule": "interleaved_1f1b", "microbatches": 5}},
         "parallel.pipeline: interleaved_1f1b needs a multiple of 2 microbatches; take 6."),
        (4, {"pipeline": {"degree": 4, "microbatches": 2}},
         "parallel.pipeline: 1f1b needs at least as many microbatches as ranks; take 4."),
    ],
)  # fmt: skip
def test_impossible_layouts_are_refused_with_a_possible_one(ranks, strategies, message):
    assert refusal(ranks, parallel=strategies, train={"batch_size": 48}) == message


def test_stages_are_refused_where_pytorch_is_too_old_for_them(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.12.1+cpu"))
    sentence = "parallel.pipeline: stages need PyTorch 2.13 or newer, and here is 2.12.1+cpu."
    assert refusal(2, parallel={"pipeline": {}}) == sentence


@pytest.mark.parametrize(
    "strategies, train, sentence",
    [
        ({"activation_checkpointing": {"mode": "selective"}}, {},
         'goes backward in two halves and can\'t have activation_checkpointing.mode = "selective", which lets it go through a '
         'block once; take "interleaved_1f1b".'),
        ({"fsdp": {}}, {}, "needs parallel.fsdp.reshard_after_forward = false, to have gathered weights at hand; or take "
         '"interleaved_1f1b".'),
        ({}, {"compile": "on"}, 'can\'t have train.compile = "on", whose compiled backward pass is one piece; take "off" or '
         '"auto".'),
    ],
)  # fmt: skip
def test_what_does_not_go_backward_in_halves_is_refused_beside_zero_bubble(strategies, train, sentence):
    """Each of these ended in torch's traceback in the first step, or lost gradients."""
    pipeline = {"pipeline": {"schedule": "zero_bubble", "microbatches": 2}}
    assert refusal(4, parallel={**pipeline, **strategies}, train=train) == f"parallel.pipeline: zero_bubble {sentence}"
    plan(4, parallel={"pipeline": {**pipeline["pipeline"], "schedule": "interleaved_1f1b"}, **strategies}, train=train)


@pytest.mark.parametrize(
    "batch, micro, ranks, strategies, sentence",
    [
        (12, 0, 1, {}, None),
        (12, 3, 4, {}, None),
        (12, 0, 5, {}, "train.batch_size = 12 is not divisible by 5 data-parallel ranks; take 10 or 15."),
        (12, 5, 1, {}, "train.batch_size = 12 is not divisible by micro_batch_size = 5; take 10 or 15."),
        (12, 4, 2, {}, "train.batch_size = 12 is not divisible by 2 data-parallel ranks x micro_batch_size = 4; take 8 or 16."),
        (3, 0, 4, {}, "train.batch_size = 3 is not divisible by 4 data-parallel ranks; take 4."),
        (12, 0, 2, {"pipeline": {}},
         "train.batch_size = 12 is not divisible by parallel.pipeline.microbatches = 8; take 8 or 16."),
        (12, 0, 2, {"tensor": {}}, None),
    ],
)  # fmt: skip
def test_a_batch_that_can_not_be_shared_out_is_refused(batch, micro, ranks, strategies, sentence):
    table = {"train": {"batch_size": batch, "micro_batch_size": micro}, "parallel": strategies}
    if sentence is None:
        plan(ranks, **table)
    else:
        assert refusal(ranks, **table) == sentence


@given(batch=st.integers(1, 99), micro=st.integers(0, 9), ranks=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_what_is_proposed_for_a_batch_is_right(batch, micro, ranks):
    unit = ranks * (micro or 1)
    try:
        plan(ranks, train={"batch_size": batch, "micro_batch_size": micro})
        assert batch % unit == 0
    except UserError as error:
        sizes, _, lower = str(error).split("take ")[1].rstrip(".").partition(", or lower micro_batch_size to ")
        proposed = [int(n) for n in sizes.split(" or ")]
        assert (int(lower) < micro and int(lower) * ranks == batch) if lower else (micro * ranks < batch or batch % ranks)
        assert batch % unit and all(n % unit == 0 and 0 < n and abs(n - batch) < unit for n in proposed)


# The norm.


def test_clipping_scales_the_whole_gradient_and_reports_its_norm():
    layout, model = plan(1), torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7))
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    n = sum(p.numel() for p in model.parameters())
    assert parallel.clip_gradients(layout, [model], 1.0).item() == pytest.approx(2 * math.sqrt(n), rel=1e-5)
    assert math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())) == pytest.approx(1.0, rel=1e-4)
    assert parallel.clip_gradients(layout, [model], 0.0).item() == pytest.approx(1.0, rel=1e-4)  # 0: never scaled
    model[0].weight.grad[0, 0] = float("inf")
    assert math.isinf(parallel.clip_gradients(layout, [model], 1.0).item())
    assert model[0].bias.grad.abs().max() > 0  # left as they were


# Stages.


@given(costs=st.lists(st.integers(1, 9), min_size=1, max_size=9), head=st.integers(0, 30), n=st.integers(1, 9))
def test_no_other_cut_into_stages_has_a_cheaper_costliest_stage(costs, head, n):
    if n > len(costs):
        return

    def costliest(cuts) -> int:
        edges = (0, *cuts, len(costs))
        sums = [sum(costs[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        return max(*sums[:-1], sums[-1] + head) if n > 1 else sums[0] + head

    stages = share_out(costs, head, n)
    assert [i for stage in stages for i in stage] == list(range(len(costs))) and all(len(stage) for stage in stages)
    assert costliest([stage.start for stage in stages[1:]]) == min(map(costliest, combinations(range(1, len(costs)), n - 1)))


def test_parameters_of_one_optimizer_group_lie_on_one_mesh():
    """Fused and foreach kernels refuse tensors with and without a mesh together."""
    table = {"model": {"name": "llama", "n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 48}}
    config, _ = configs.from_dict(table, "test")
    model = config.model.build(64, 16)
    model.blocks["0"].attn.q.weight.device_mesh = "another"
    groups = [group["params"] for optimizer in optim.build(config.optimizer, model) for group in optimizer.param_groups]
    assert sorted(len({getattr(p, "device_mesh", None) for p in group}) for group in groups) == [1] * len(groups)
    assert sum(map(len, groups)) == len(list(model.parameters())) and len(groups) == 3


# What a user sees.


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 0, 1)),
        ({"RANK": "1"}, (0, 0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 1, 4)),
        ({"WORLD_SIZE": "2"}, "RANK=, LOCAL_RANK=, WORLD_SIZE=2, MASTER_ADDR=, MASTER_PORT= in the environment: torchrun "),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2, "),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=0, "),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "RANK=0, "),
        ({"WORLD_SIZE": "-2", "RANK": "-3", "LOCAL_RANK": "-3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=-3, "),
    ],
)
def test_the_place_of_a_process_is_what_torchrun_says_whole_or_refused(environment, expected, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, tuple):
        assert distributed.place() == expected
    else:
        with pytest.raises(UserError, match=f"^{re.escape(expected)}.*; for a single process unset WORLD_SIZE.$"):
            distributed.place()


def come_alone() -> None:
    with mock.patch.dict(os.environ, {"WORLD_SIZE": "2", "MASTER_PORT": "0", "TORCHELASTIC_USE_AGENT_STORE": ""}):
        with distributed.start(torch.device("cpu"), timeout=1):
            pass


def test_ranks_that_do_not_come_are_waited_for_no_longer_than_the_time_out(ranks):
    [(_, _, error)] = ranks.run(1, come_alone)
    assert "UserError: rank 0: the 2 ranks did not meet at 127.0.0.1:0 within 1 s (train.timeout): " in error


def test_an_error_that_one_rank_alone_meets_before_the_others_is_said(tiny, tmp_path):
    (tmp_path / "particular.py").write_text("import os\nassert os.environ['RANK'] == '0', 'not on this machine'\n")
    result = run_script("train.py", *tiny, f'--plugins=["{tmp_path}/particular.py"]', processes=2)
    assert result.returncode != 0
    assert result.stderr.count("not on this machine") == 1 and 'train.py", line' not in result.stderr


@pytest.mark.slow
def test_an_objective_of_two_models_can_not_be_split(tiny):
    flags = ["--objective.name=electra", "--model.name=bert", "--model.n_layers=2", "--model.d_ff=64"]
    result = run_script("train.py", *tiny, *flags, "--parallel.tensor={}", processes=2)
    assert result.returncode != 0
    sentence = "parallel.tensor: objective electra has more than one model, which can't be split; leave it out."
    assert result.stderr.count(sentence) == 1


@pytest.mark.slow
def test_the_layout_is_told_and_saved_with_the_run(tiny, tmp_path):
    flags = ["--model.n_kv_heads=2", "--parallel.tensor.sequence_parallel=true"]
    flags += ["--parallel.pipeline.microbatches=2", "--train.batch_size=4"]
    result = run_script("train.py", *tiny, *flags, "--train.samples=1", processes=4)
    assert result.returncode == 0, result.stderr
    assert "4 processes = pipeline 2 x tensor 2 (pipeline, tensor)" in result.stdout
    assert "--- sample 1 ---" in result.stdout  # from the checkpoint: no rank has the whole model
    shown = run_script("sample.py", tmp_path / "runs" / "tiny", "--tokens=5")
    assert shown.returncode == 0, shown.stderr
    saved = configs.load(tmp_path / "runs" / "tiny" / "config.toml")[0]
    assert saved.parallel["tensor"].sequence_parallel and saved.parallel["pipeline"].microbatches == 2
    expected = ("torch.distributed.run", "tokenised")  # torchrun's note on threads; the first run with this corpus
    noise = [line for line in result.stderr.splitlines() if line.strip() and not any(word in line for word in expected)]
    assert not noise, noise
    # And one process reads it: to export it, to start another run from it.
    hf.export_model(tmp_path / "runs" / "tiny", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    ours = checkpoint.open_run(tmp_path / "runs" / "tiny").model.state_dict()
    assert torch.equal(exported["model.layers.1.mlp.down_proj.weight"], ours["blocks.1.mlp.down.weight"])
    config = Path(tiny[0])
    config.write_text(config.read_text().replace('tokenizer = { name = "bytes" }', ""))  # init_from brings its own
    flags = ["--model.n_kv_heads=2", "--train.steps=1", "--optimizer.lr=0"]
    train.main([tiny[0], f"--init_from={tmp_path}/runs/tiny", "--name=next", *flags])
    began = checkpoint.open_run(tmp_path / "runs" / "next").model.state_dict()
    assert ours.keys() == began.keys() and all(torch.equal(ours[name], began[name]) for name in ours)


# Silent failures of the engines that the model's own cut avoids (for the others, test_layouts.py).


def fused_and_separate() -> tuple[float, float]:
    """How far attention over two ranks is from the whole: with query, key and value as one matrix, and as three."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from nanopre import model as models
    from nanopre.attention import attend

    config = models.ModelConfig(
        vocab_size=64, seq_len=8, d_model=32, n_layers=1, n_heads=4, n_kv_heads=4, d_ff=32, positions="rope",
        norm="rmsnorm", norm_eps=1e-5, activation="swiglu", bias=False, tie_embeddings=False,
    )  # fmt: skip

    class Fused(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.qkv = nn.Linear(32, 96, bias=False)
            self.qkv.weight = nn.Parameter(torch.cat([p.weight for p in (attention.q, attention.k, attention.v)]).detach())
            self.out = nn.Linear(32, 32, bias=False)
            self.out.weight = nn.Parameter(attention.out.weight.detach().clone())
            self.split, self.rope = attention.split, attention.rope

        def forward(self, h):
            q, k, v = map(self.split, self.qkv(h).chunk(3, dim=-1))
            table = self.rope[:, : h.shape[1]]
            a = attend(models.rotate(q, table), models.rotate(k, table), v)
            return self.out(a.transpose(1, 2).reshape(*h.shape[:2], -1))

    torch.manual_seed(0)
    attention, h = models.Attention(config, "causal"), torch.randn(2, 8, 32)
    fused, whole = Fused(attention), attention(h).detach()
    assert (fused(h) - whole).abs().max() < 1e-6
    with distributed.start(torch.device("cpu")):
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(fused, mesh, {"qkv": ColwiseParallel(), "out": RowwiseParallel()})
        separate = {**dict.fromkeys("qkv", ColwiseParallel()), "out": RowwiseParallel()}
        parallelize_module(attention, mesh, separate)
        return (fused(h) - whole).abs().max().item(), (attention(h) - whole).abs().max().item()


def test_query_key_and_value_are_three_matrices_because_one_splits_wrongly_without_an_error(ranks):
    for result, _, error in ranks.run(2, fused_and_separate):
        assert error is None, error
        fused, separate = result
        assert separate < 1e-6 and fused > 1e-2
