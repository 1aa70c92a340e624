"""What the strategies of memory hold and what they leave, in bytes; and that nothing else changes. That layouts with them
agree is proved in test_layouts.py."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from conftest import read_log
from hypothesis import given, strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.profiler import ProfilerActivity, profile

from nanopre import UserError, checkpoint, config as configs, machine, optim, parallel
from nanopre.config import Train
from nanopre.distributed import World, initialise
from nanopre.generate import generate
from nanopre.plugins import load_plugins

PLUGINS, HERE = load_plugins(), machine.choose(Train(device="cpu"))
B, T, C, F, H, V = 4, 64, 32, 48, 2, 96
STREAM = B * T * C * 4  # bytes of a stream in float32
FULL, SELECTIVE, NONE = ({"activation_checkpointing": {"mode": mode}} for mode in ("full", "selective", "none"))
OFFLOAD = {"activation_offload": {}}


def build(strategies: dict, family: str = "gpt2", n_layers: int = 2, **options):
    options = {"d_model": C, "n_heads": H, "d_ff": F, "n_layers": n_layers, **options}
    model = PLUGINS.get("model", family, "test")(**options).build(vocab_size=V, seq_len=T)
    initialise(model, 0)
    HERE.choose_attention(model)
    for name, values in parallel.in_order({n: PLUGINS.get("parallel", n, "test")(**o) for n, o in strategies.items()}).items():
        assert values.phase == "memory", name
        (model,) = values.apply([model], None)
    return model


def batch(model, rows: int = B, length: int = T) -> dict:
    tokens = torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(0))
    if model.config.architecture == "encoder":
        return {"tokens": tokens, "visible": torch.full((rows,), length)}
    return {"tokens": tokens, "decoder_tokens": tokens.flip(1)} if model.config.n_decoder_layers else {"tokens": tokens}


def loss_of(model, *shape: int) -> torch.Tensor:
    inputs = batch(model, *shape)
    return model(**inputs, loss=lambda head, h, _: head.cross_entropy(h, inputs["tokens"]))


def held(model, rows: int = B, length: int = T, precision: str = "float32") -> int:
    """Bytes that a forward pass has allocated and not given back at its end, by torch's own accounting."""

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return loss_of(model, rows, length)

    forward()  # what the first pass alone allocates
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = forward()
    assert loss.requires_grad
    return sum(e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]")


def saved(model) -> int:
    """Bytes that autograd saves on the device, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def note(t):
        if t.untyped_storage().data_ptr() not in parameters:
            seen[t.untyped_storage().data_ptr()] = t  # held, so that no other tensor takes its place
        return t

    with saved_tensors_hooks(note, lambda t: t):
        loss = loss_of(model)
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for t in seen.values())


@pytest.mark.parametrize("family, streams", [("gpt2", 3), ("t5", 7)])
def test_full_and_offload_leave_the_stream_of_each_block_to_the_cpu(family, streams, monkeypatch):
    """Of 3 blocks, or 3 of an encoder, whose output all of the decoder's read, and 3 of a decoder."""
    options = {"n_decoder_layers": 3} if family == "t5" else {}
    offloaded = PLUGINS.get("parallel", "activation_offload", "test").apply.__globals__["Offloaded"]
    moved = {}
    original = offloaded.__init__

    def note(self, t):
        moved[t.untyped_storage().data_ptr()] = t
        original(self, t)

    monkeypatch.setattr(offloaded, "__init__", note)
    models = [build(s, family, 3, **options) for s in ({}, OFFLOAD, {**OFFLOAD, **FULL}, FULL)]
    plain, left = saved(models[0]), saved(models[1])
    n_moved = sum(t.untyped_storage().nbytes() for t in moved.values())
    # Nothing of the blocks stays: what is left is the last stream and the head's.
    parameters = {p.untyped_storage().data_ptr() for p in models[1].parameters()}
    assert not parameters & moved.keys()
    assert left < 0.2 * plain and plain <= n_moved + left <= plain + 2 * STREAM  # streams at the edge are on both sides
    moved.clear()
    saved(models[2])
    assert sum(t.untyped_storage().nbytes() for t in moved.values()) == streams * STREAM
    assert saved(models[3]) >= streams * STREAM  # without offload they are on the device


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, whose memory it would save")
def test_offload_frees_the_gpus_memory():
    peaks = []
    for strategies in ({}, OFFLOAD):
        model = build(strategies, n_layers=8).cuda()
        tokens = batch(model)["tokens"].cuda()
        before = torch.cuda.memory_allocated()
        loss = model(tokens, loss=lambda head, h, _: h.sum())
        peaks.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    assert peaks[1] < 0.3 * peaks[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("strategies", [FULL, SELECTIVE, OFFLOAD, {**FULL, **OFFLOAD}])
def test_gradients_are_the_same_with_dropout(family, strategies):
    options = {"dropout": 0.3, **({"n_decoder_layers": 2} if family == "t5" else {})}
    gradients = []
    for chosen in ({}, strategies):
        model = build(chosen, family, **options)
        torch.manual_seed(3)
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_block_that_is_compiled_does_not_hide_its_products():
    model = build({})
    for block in model.blocks.values():
        block.compile(backend="aot_eager")
    PLUGINS.get("parallel", "activation_checkpointing", "test")("selective").apply([model], None)
    for block in model.blocks.values():
        assert isinstance(block, CheckpointWrapper) and block._compiled_call_impl
        assert not block._checkpoint_wrapped_module._compiled_call_impl


def test_a_checkpoint_shows_no_wrapper_and_decoding_goes_through_it(tmp_path):
    plain, wrapped = build({}), build({**FULL, **OFFLOAD})
    adamw = PLUGINS.get("optimizer", "adamw", "test")()
    states = [checkpoint.state_of([m], optim.build(adamw, m)) for m in (plain, wrapped)]
    assert states[0][0].keys() == states[1][0].keys() and states[0][1].keys() == states[1][1].keys()
    assert all(torch.equal(a, states[1][0][name]) for name, a in states[0][0].items())
    sizes = [[len(group) for group in optim.split_parameters(m)] for m in (plain, wrapped)]
    assert sizes[0] == sizes[1] and sizes[0][0] == 12
    decoded = [list(generate(m.eval(), [1, 2, 3], 20, 0.0)) for m in (plain, wrapped)]
    assert decoded[0] == decoded[1] and len(decoded[0]) == 20


def test_a_single_process_has_them_too(tiny, tmp_path):
    import train

    losses = []
    for name, extra in {"plain": [], "full": ["--parallel.activation_checkpointing.mode=full"]}.items():
        train.main([*tiny, f"--name={name}", "--train.steps=4", *extra])
        steps, evaluations = read_log(tmp_path / "runs" / name)
        losses.append([line["loss"] for line in steps] + [line["val_loss"] for line in evaluations])
    assert losses[0] == losses[1]
    table = {"parallel": {**OFFLOAD, **FULL}}
    layout = parallel.plan(*configs.from_dict(table, "test"), World(0, 0, 1, torch.device("cpu")))
    assert list(layout.strategies) == ["activation_checkpointing", "activation_offload"]


# Optimizers.


def test_without_torchao_adamw8bit_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"adamw8bit needs torchao, .*: pip install .nanopre\[8bit\]., or take .adamw") as error:
        PLUGINS.get("optimizer", "adamw8bit", "test")().build(build({}))
    assert "\n" not in str(error.value)


def test_where_torchaos_kernel_fails_adamw8bit_is_refused_in_a_sentence(monkeypatch):
    class NoCompiler(torch.optim.SGD):
        def __init__(self, params, *_):
            super().__init__(params)

        def step(self):
            raise RuntimeError("no C++ compiler\n  a long trace")

    monkeypatch.setitem(sys.modules, "torchao.optim", types.SimpleNamespace(AdamW8bit=NoCompiler))
    with pytest.raises(UserError, match='does not work on this device, "cpu" .no C.. compiler.: take "adamw"') as error:
        PLUGINS.get("optimizer", "adamw8bit", "test")().build(build({}))
    assert "\n" not in str(error.value)


def train_a_model(optimizer: str, n_steps: int = 40, lr: float = 3e-3, dtype=torch.float32, **options):
    """(losses, optimizers) of a tiny model that learns a batch by heart."""
    model = build({}, d_model=64, d_ff=64)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    optimizers = optim.build(PLUGINS.get("optimizer", optimizer, "test")(lr=lr, **options), model)
    peaks, losses = optim.peak_rates(optimizers), []
    for step in range(n_steps):
        optim.set_rates(optimizers, peaks, min(1, (step + 1) / 10))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = loss_of(model) / (B * T)
        loss.backward()
        losses.append(loss.item())
        for o in optimizers:
            o.step()
            o.zero_grad()
    return losses, optimizers


def test_adamw8bit_follows_adamw_with_a_quarter_of_its_states():
    pytest.importorskip("torchao", reason="the extra 8bit is not installed")
    (exact, _), (losses, [optimizer]) = train_a_model("adamw"), train_a_model("adamw8bit")
    assert exact[-1] < 0.5 * exact[0] and exact != losses
    assert max(abs(a - b) for a, b in zip(exact, losses, strict=True)) < 0.02 * exact[0]
    for p, state in optimizer.state.items():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            if p.dim() < 2:
                assert moment.dtype == torch.float32 and not hasattr(moment, "codes")
            else:  # a byte a number, and a scale a block of 256
                assert moment.codes.dtype == torch.uint8 and moment.codes.nbytes == p.numel()
                assert moment.scale.nbytes == p.numel() // 256 * 4


@pytest.fixture
def resumed(tiny, tmp_path):
    """The losses of a run that stops in the middle and goes on, and of the same run in one piece."""

    def run(*options) -> tuple[list[float], list[float]]:
        import train

        options = [*tiny, "--model.d_model=64", "--train.batch_size=4", "--schedule.name=constant", *options]
        train.main([*options, "--name=whole", "--train.steps=6"])
        train.main([*options, "--name=parts", "--train.steps=3"])
        train.main(["--resume", str(tmp_path / "runs" / "parts"), "--train.steps=6"])
        return tuple([line["loss"] for line in read_log(tmp_path / "runs" / name)[0]] for name in ("whole", "parts"))

    return run


def test_adamw8bit_resumes_bitwise(resumed):
    pytest.importorskip("torchao", reason="the extra 8bit is not installed")
    whole, parts = resumed("--optimizer.name=adamw8bit")
    assert len(whole) == 6 and whole == parts


# bfloat16 weights.

ADAMW = PLUGINS.get("optimizer", "adamw", "test")
round_at_random = sys.modules[ADAMW.__module__].round_at_random


@given(st.integers(0, 2**32 - 1), st.floats(-(2.0**100), 2.0**100, width=32))
def test_rounding_gives_one_of_the_two_neighbours(seed, number):
    x = torch.tensor([number])
    rounded = round_at_random(x, torch.Generator().manual_seed(seed))
    below = (x.view(torch.int32) & -(2**16)).view(torch.float32)  # in magnitude
    above = ((x.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
    assert rounded.dtype == torch.bfloat16 and rounded.float() in (below, above)
    again = round_at_random(rounded.float(), torch.Generator().manual_seed(seed + 1))
    assert torch.equal(again, rounded)  # what is a bfloat16 stays


def test_the_mean_of_many_roundings_is_the_number():
    n = 50_000
    x = torch.tensor([1.001, -1.001, 3.14159, -0.0123, 1e-20, 255.5])
    draws = round_at_random(x.expand(n, -1).contiguous(), torch.Generator().manual_seed(0)).double()
    standard_error = draws.std(dim=0) / n**0.5
    assert ((draws.mean(dim=0) - x).abs() < 4 * standard_error).all()
    nearest = x.bfloat16().double()
    assert ((nearest - x).abs() > 4 * standard_error).sum() >= 5  # which would not pass


def test_small_updates_count_at_random_and_are_lost_at_the_nearest():
    """200 steps of 1e-4 from 1.0, where the next bfloat16 below is 0.0039 away."""
    moved = {}
    for stochastic in (True, False):
        model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        model.weight.data.fill_(1.0)
        model.config = types.SimpleNamespace(mup_base_width=0, width_ratio=1.0)
        [optimizer] = optim.build(ADAMW(lr=1e-4, weight_decay=0.0, stochastic_rounding=stochastic), model)
        for _ in range(200):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
        moved[stochastic] = 1 - model.weight.float()
        assert all(optimizer.state[model.weight][key].dtype == torch.float32 for key in ("exp_avg", "exp_avg_sq"))
    assert (moved[False] == 0).all()
    assert abs(moved[True].mean() - 0.02) < 4 * moved[True].std() / 64


def test_copies_of_a_parameter_are_rounded_alike_and_others_not():
    weights = []
    for seed, name in ((1, "a"), (2, "a"), (2, "b")):
        model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32, bias=False, dtype=torch.bfloat16)})
        model.config = types.SimpleNamespace(mup_base_width=0, width_ratio=1.0)
        model[name].weight.data.fill_(1.0)
        model[name].weight.grad = torch.ones(32, 32, dtype=torch.bfloat16)
        torch.manual_seed(seed)  # of other dropout, on another rank
        optim.build(ADAMW(lr=1e-3), model)[0].step()
        weights.append(model[name].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_training_with_bfloat16_weights_follows_float32_if_they_are_rounded_at_random():
    options = {"n_steps": 150, "lr": 3e-4, "weight_decay": 0.0}
    exact, _ = train_a_model("adamw", **options)
    ours, _ = train_a_model("adamw", dtype=torch.bfloat16, **options)
    nearest, _ = train_a_model("adamw", dtype=torch.bfloat16, stochastic_rounding=False, **options)
    far, further = ((torch.tensor(losses) - torch.tensor(exact)).abs().max() for losses in (ours, nearest))
    assert exact[-1] < 0.5 * exact[0]
    assert far < 0.02 and further > 5 * far  # nats


def test_a_run_with_bfloat16_weights_resumes_bitwise_and_samples(resumed, tmp_path, capsys):
    whole, parts = resumed("--train.weights=bfloat16", "--train.precision=auto", "--train.samples=1")
    assert len(whole) == 6 and whole == parts
    assert "--- sample 1 ---" in capsys.readouterr().out
    opened = checkpoint.open_run(tmp_path / "runs" / "parts")
    assert all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in opened.model.parameters())


@pytest.mark.parametrize("name", ["muon", "adamw8bit"])
def test_an_optimizer_that_would_lose_updates_is_refused(name, monkeypatch):
    model = build({}).bfloat16()
    plugin = PLUGINS.get("optimizer", name, "test")()
    plugin._plugin_name = name
    monkeypatch.setattr(type(plugin), "build", lambda self, model: [torch.optim.SGD(model.parameters(), 0.1)])
    with pytest.raises(UserError, match=f'bfloat16: optimizer "{name}" would lose small updates of them; take "adamw"'):
        optim.build(plugin, model)


def test_bfloat16_weights_with_float32_products_are_refused():
    with pytest.raises(UserError, match='weights = "bfloat16" needs precision = "bfloat16" or "auto"'):
        configs.from_dict({"train": {"weights": "bfloat16", "precision": "float32"}}, "test")
