"""Schedules by their closed forms; optimizers beside torch's own."""

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st

from nanopre import UserError, optim
from nanopre.config import Schedule
from nanopre.distributed import initialise
from nanopre.model import ModelConfig, Transformer
from nanopre.plugins import load_plugins

CONFIG = ModelConfig(
    vocab_size=50,
    seq_len=16,
    d_model=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    d_ff=48,
    positions="learned",
    norm="layernorm",
    norm_eps=1e-5,
    activation="gelu_tanh",
    bias=True,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.fixture
def model():
    model = Transformer(CONFIG)
    initialise(model, 0)
    return model


class Odd:
    _plugin_name = "odd"

    def __init__(self, made: object):
        self.made = made

    def build(self, model):
        return self.made


@pytest.mark.parametrize("made", [[], None, [5], torch.optim.SGD([torch.zeros(1)], 0.1)])
def test_a_plugin_that_builds_no_optimizers_is_named(made):
    message = 'optimizer: the build of "odd" gave .*; it must give a list of torch.optim.Optimizer'
    with pytest.raises(UserError, match=message) as error:
        optim.build(Odd(made), None)
    assert "\n" not in str(error.value)


def test_cosine_is_nanogpts_schedule():
    # The formula of nanoGPT's get_lr: warm-up (it + 1) / (warmup + 1), then half a cosine to min_lr.
    schedule = Schedule(name="cosine", warmup_steps=100, min_lr_ratio=0.1)
    for it in range(2000):
        if it < 100:
            expected = (it + 1) / 101
        else:
            expected = 0.1 + 0.5 * (1 + math.cos(math.pi * (it - 100) / 1900)) * 0.9
        assert optim.learning_rate_factor(schedule, it, 2000) == pytest.approx(expected, abs=1e-12)


def test_wsd_is_flat_and_then_falls_in_a_line():
    schedule = Schedule(name="wsd", warmup_steps=10, min_lr_ratio=0.0, decay_fraction=0.25)
    factors = [optim.learning_rate_factor(schedule, step, 200) for step in range(200)]
    assert factors[:10] == [(i + 1) / 11 for i in range(10)]
    assert set(factors[10:150]) == {1.0}
    assert factors[150:] == pytest.approx([(200 - step) / 50 for step in range(150, 200)])


@given(
    st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    st.integers(0, 50),
    st.integers(1, 100),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_schedule_stays_between_its_bounds(name, warmup, steps, ratio, fraction):
    schedule = Schedule(name=name, warmup_steps=warmup, min_lr_ratio=ratio, decay_fraction=fraction)
    factors = [optim.learning_rate_factor(schedule, step, steps) for step in range(steps)]
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    after = factors[warmup:]
    assert all(a >= b - 1e-12 for a, b in zip(after, after[1:], strict=False))  # never up again
    assert all(f >= ratio - 1e-12 for f in after)


def test_parameters_are_split_by_what_they_are(model):
    matrices, ends, vectors = optim.split_parameters(model)
    assert sorted(p.shape for p in matrices) == sorted([(32, 32)] * 8 + [(48, 32)] * 2 + [(32, 48)] * 2)
    assert sorted(p.shape for p in ends) == [(16, 32), (50, 32)]
    assert all(p.dim() == 1 for p in vectors)
    assert len(matrices) + len(ends) + len(vectors) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(plugins, model, name):
    # With zero gradients an optimizer moves nothing but what it decays.
    optimizers = plugins.get("optimizer", name, "test")(lr=0.1, weight_decay=0.5).build(model)
    before = copy.deepcopy(dict(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for key, p in model.named_parameters():
        expected = before[key] * (1 - 0.1 * 0.5) if p.dim() == 2 else before[key]
        torch.testing.assert_close(p, expected)


def test_muon_agrees_with_torchs(plugins, model):
    """Three steps beside torch.optim.Muon with the same scale of the update; both orthogonalise by the same iteration,
    torch's in bfloat16, so that they agree to its rounding."""
    theirs_model = copy.deepcopy(model)
    matrices, _, _ = optim.split_parameters(theirs_model)
    theirs = torch.optim.Muon(
        matrices, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    ours = plugins.get("optimizer", "muon", "test")(lr=0.01, weight_decay=0.1, momentum=0.95).build(model)[0]
    start = copy.deepcopy(list(optim.split_parameters(model)[0]))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(optim.split_parameters(model)[0], matrices, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b, s in zip(optim.split_parameters(model)[0], matrices, start, strict=True):
        assert (a - b).norm() < 0.02 * (a - s).norm()


def test_muons_update_is_close_to_the_nearest_orthogonal_matrix(plugins):
    orthogonalise = vars(__import__("sys").modules[plugins.get("optimizer", "muon", "test").__module__])["orthogonalise"]
    g = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for x in (g, g.mT):
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        update = orthogonalise(x).float()  # bfloat16 where that is fast
        singular = torch.linalg.svdvals(update)
        assert (singular > 0.6).all() and (singular < 1.3).all()
        # The same directions as U V^T, singular value by singular value.
        assert torch.linalg.matrix_norm(update - u @ v).max() < 0.3 * 20**0.5


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr=-1.0), "lr = -1.0 must be at least 0"),
        (dict(lr=math.nan), "lr = nan must be at least 0"),
        (dict(lr=math.inf), "lr = inf must be finite"),
        (dict(beta1=2.0), "beta1 = 2.0 must be at least 0 and below 1"),
        (dict(eps=-1.0), "eps = -1.0 must be at least 0"),
        (dict(weight_decay=-1.0), "weight_decay = -1.0 must be at least 0"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_plugins().get("optimizer", name, "test")(**options)
