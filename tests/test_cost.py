"""The arithmetic of cost.py against models that are built and FLOPs that are counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, baddbmm_flop

from nanopre import cost, machine
from nanopre.config import Train
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


def test_t5_1_1_base(plugins):
    settings = plugins.get("model", "t5", "test")(d_ff=2048).settings(vocab_size=32_128, seq_len=512)
    assert cost.parameters(settings)["total"] == 247_577_856  # google/t5-v1_1-base


def test_llama_7b_and_its_grouped_successor(plugins):
    llama = plugins.get("model", "llama", "test")
    seven = llama(d_model=4096, n_layers=32, n_heads=32, d_ff=11_008).settings(32_000, 2048)
    assert cost.parameters(seven)["total"] == 6_738_415_616  # LLaMA 7B
    eight = llama(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336).settings(128_256, 8192)
    assert cost.parameters(eight)["total"] == 8_030_261_248  # Llama 3 8B


SHAPE = dict(vocab_size=37, seq_len=11, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=31, norm_eps=1e-5)
ARCHITECTURES = {
    "decoder": {},
    "encoder": dict(architecture="encoder", post_norm=True, embedding_norm=True, n_segments=2, transform=True),
    "encoder, norms before": dict(architecture="encoder", embedding_norm=True, n_segments=3, transform=True),
    "encoder-decoder": dict(architecture="encoder-decoder", n_decoder_layers=3, d_head=10, relative_buckets=7),
    "encoder-decoder, norms after": dict(architecture="encoder-decoder", n_decoder_layers=1, post_norm=True),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh"])
@pytest.mark.parametrize(
    "tie, qk_norm, positions", [(True, True, "rope"), (False, False, "learned"), (True, False, "relative")]
)
def test_parameters_are_those_of_the_built_model(architecture, bias, norm, activation, tie, qk_norm, positions):
    config = ModelConfig(
        **SHAPE,
        **ARCHITECTURES[architecture],
        positions=positions,
        norm=norm,
        activation=activation,
        bias=bias,
        tie_embeddings=tie,
        qk_norm=qk_norm,
    )
    with torch.device("meta"):
        model = Transformer(config)
    parts = cost.parameters(config)
    assert parts["total"] == sum(p.numel() for p in model.parameters())
    assert parts["embedding"] == sum(p.numel() for p in model.embed.parameters())
    last_norm = sum(p.numel() for p in model.head.norm.parameters())
    assert parts["head"] == sum(p.numel() for p in model.head.parameters()) - last_norm - tie * 37 * 24


def counted_flops(config: ModelConfig, T: int, D: int = 0, scored: int | None = None) -> int:
    """Forward and backward of two rows, as torch counts them: products of matrices alone."""
    model, tokens = Transformer(config), torch.zeros(2, T, dtype=torch.long)
    machine.choose(Train(attention="products")).choose_attention(model)
    decoder_tokens = torch.zeros(2, D, dtype=torch.long) if D else None
    targets = torch.zeros(2, scored or D or T, dtype=torch.long)
    in_place = {torch.ops.aten.baddbmm_: baddbmm_flop.__wrapped__}  # which torch does not count by itself
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(
            tokens,
            decoder_tokens=decoder_tokens,
            loss=lambda head, h, _: head.cross_entropy(h[:, : targets.shape[1]], targets),
        ).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_flops_are_those_that_torch_counts(architecture, activation):
    """Attention runs as whole products here: one block of 128 queries."""
    shape = SHAPE | dict(seq_len=64) | ARCHITECTURES[architecture]
    config = ModelConfig(
        **shape, positions="rope", norm="rmsnorm", activation=activation, bias=False, tie_embeddings=False
    )
    D = 23 if architecture.startswith("encoder-decoder") else 0
    assert counted_flops(config, 64, D) == cost.flops_per_token(config, 64, D) * 64 * 2
    assert counted_flops(config, 64, D, scored=9) == cost.flops_per_token(config, 64, D, scored=9) * 64 * 2


def test_flops_follow_the_published_formula():
    """6 N + 12 L H Q T, where N is all but norms and the lookup of an untied embedding."""
    config = ModelConfig(
        **SHAPE | dict(n_kv_heads=4), positions="rope", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False
    )
    parts, norms = cost.parameters(config), (2 * 2 + 1) * 24
    assert cost.flops_per_token(config, 11) == 6 * (parts["blocks"] - norms + parts["head"]) + 12 * 2 * 24 * 11


def test_mfu_needs_a_known_peak():
    assert cost.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_flops_of_a_batch_are_read_from_its_widths(plugins):
    config = plugins.get("model", "t5", "test")(d_model=32, n_layers=2, n_heads=2, d_head=16).settings(96, 64)
    batch = {"tokens": torch.zeros(3, 20), "decoder_tokens": torch.zeros(3, 7), "targets": torch.zeros(3, 7)}
    assert cost.flops(config, batch) == 3 * 20 * cost.flops_per_token(config, 20, decoder_len=7)
    config = plugins.get("model", "bert", "test")(d_model=32, n_layers=2, n_heads=2).settings(96, 64)
    batch = {"tokens": torch.zeros(3, 20), "positions": torch.zeros(3, 4)}
    assert cost.flops(config, batch) == 3 * 20 * cost.flops_per_token(config, 20, scored=4)
