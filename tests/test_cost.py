"""The arithmetic of cost.py against models that are built and FLOPs that are counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanopre import cost
from nanopre.model import ModelConfig, Transformer
from nanopre.plugins import load_plugins


@pytest.fixture(scope="module")
def plugins():
    return load_plugins()


@pytest.mark.parametrize(
    "name, options, total",
    [
        # GPT-2's published sizes with 50,257 tokens and 1,024 positions, as transformers counts them.
        ("gpt2", {}, 124_439_808),
        ("gpt2", {"d_model": 1024, "n_layers": 24, "n_heads": 16}, 354_823_168),
        ("gpt2", {"d_model": 1600, "n_layers": 48, "n_heads": 25}, 1_557_611_200),
    ],
)
def test_published_parameter_counts(plugins, name, options, total):
    settings = plugins.get("model", name, "test")(**options).settings(vocab_size=50_257, seq_len=1024)
    assert cost.parameters(settings)["total"] == total


def test_llama_7b_and_its_grouped_successor(plugins):
    llama = plugins.get("model", "llama", "test")
    seven = llama(d_model=4096, n_layers=32, n_heads=32, d_ff=11_008).settings(32_000, 2048)
    assert cost.parameters(seven)["total"] == 6_738_415_616  # LLaMA 7B
    eight = llama(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336).settings(128_256, 8192)
    assert cost.parameters(eight)["total"] == 8_030_261_248  # Llama 3 8B


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("tie, qk_norm, positions", [(True, True, "rope"), (False, False, "learned")])
def test_parameters_are_those_of_the_built_model(bias, norm, activation, tie, qk_norm, positions):
    config = ModelConfig(
        vocab_size=37,
        seq_len=11,
        d_model=24,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_ff=31,
        positions=positions,
        norm=norm,
        norm_eps=1e-5,
        activation=activation,
        bias=bias,
        tie_embeddings=tie,
        qk_norm=qk_norm,
    )
    assert cost.parameters(config)["total"] == sum(p.numel() for p in Transformer(config).parameters())


def test_flops_are_those_that_torch_counts():
    """Forward and backward of the matrix products, counted by torch, against 6 N + 12 L H Q T without the parts of N
    that are not products (norms). Attention runs as whole products here: one block of 128 queries."""
    config = ModelConfig(
        vocab_size=96,
        seq_len=64,
        d_model=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=4,
        d_ff=80,
        positions="rope",
        norm="rmsnorm",
        norm_eps=1e-5,
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )
    model = Transformer(config)
    tokens = torch.zeros(2, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets=tokens, loss=lambda head, h, batch: head.cross_entropy(h, batch["targets"])).backward()
    norms = (2 * config.n_layers + 1) * config.d_model
    expected = cost.flops_per_token(config, 64) - 6 * norms
    assert counter.get_total_flops() == expected * tokens.numel()


def test_mfu_needs_a_known_peak():
    assert cost.peak_flops(torch.device("cpu"), torch.bfloat16) is None
