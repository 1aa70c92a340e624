"""Shapes: as large as asked for, made as published models are, and refused where a family has none so small."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanopre import UserError
from nanopre.cost import parameters
from nanopre.planning import shape
from nanopre.planning.laws import PUBLISHED
from nanopre.plugins import load_plugins

PLUGINS = load_plugins()
FAMILIES = ("llama", "gpt2", "bert", "modern_encoder", "t5")


def build(family: str, n: float, **options):
    return shape.build(family, PLUGINS.get("model", family, ""), n, options.pop("seq_len", 512), **options)


@given(
    flops=st.floats(15, 27).map(lambda x: 10**x),
    family=st.sampled_from(FAMILIES),
    law=st.sampled_from(("chinchilla-1", "chinchilla-3", "besiroglu")),
    tensor=st.sampled_from((1, 2, 8)),
)
@settings(max_examples=100, deadline=None)
def test_a_budget_of_any_size_gets_a_model_of_the_size_asked_for(flops, family, law, tensor):
    n = float(PUBLISHED[law][0].allocate(flops).params)
    multiple = 64 if tensor == 1 else 128 * tensor
    options, tokens, config = build(family, n, multiple=multiple)
    total = parameters(config)["total"]
    if n >= 2e6:  # at 1e15 FLOP a law may want fewer
        assert abs(math.log(total / n)) < (0.02 if n >= 1e7 else 0.065)
        assert 1 / 3.5 < config.d_model / config.n_layers / shape.aspect_ratio(n) < 3.5
    assert config.d_model % 32 == 0
    assert config.d_model % (64 if config.d_model >= 256 else 32) == 0
    assert config.head_dim in (32, 64, 128) and config.n_heads * config.head_dim == config.d_model
    assert config.vocab_size % multiple == 0 and 0 <= config.vocab_size - tokens < multiple
    if config.d_model >= 4096:
        assert config.n_heads % 8 == 0 and config.n_layers % 2 == 0  # for 8 tensor ranks, and pipelines
        assert config.n_kv_heads == (8 if family == "llama" else config.n_heads)
    if n >= 1e7:
        tables = 1 if config.tie_embeddings else 2
        assert tables * config.vocab_size * config.d_model < 0.25 * total


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_that_is_built_has_the_parameters_that_were_counted(family):
    options, tokens, config = build(family, 3e8)
    with torch.device("meta"):
        model = PLUGINS.get("model", family, "")(**options).build(tokens, 512)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)["total"]


# d_model, n_layers, n_heads, as published: Radford et al. (2019), table 2; Brown et al. (2020), table 2.1.
@pytest.mark.parametrize(
    ("n", "published"),
    [(124e6, (768, 12)), (1.3e9, (2048, 24)), (6.7e9, (4096, 32)), (13e9, (5120, 40)), (175e9, (12288, 96))],
)
def test_gpt_2_and_gpt_3_are_what_the_rule_gives_for_their_sizes(n, published):
    _, _, config = build("gpt2", n, seq_len=2048, vocab_size=50257)
    assert (config.d_model, config.n_layers) == published


def test_llama_2_7b_is_near_what_the_rule_gives_for_its_size():
    options, _, config = build("llama", 6.74e9, seq_len=4096, vocab_size=32000)  # 32 layers of 4,096 with 32 heads of keys
    assert config.d_model == 4096 and 32 <= config.n_layers <= 36 and options["vocab_size"] == 32000


def test_embeddings_need_not_count():
    _, _, config = build("llama", 1e8, counted="blocks")
    assert abs(parameters(config)["blocks"] / 1e8 - 1) < 0.02


def test_the_vocabulary_of_small_models_is_small():
    tokens = [build("llama", n)[1] for n in (5e4, 1e6, 1e7, 1e8, 1e9, 1e10)]
    assert tokens == sorted(tokens) and tokens[0] == shape.BYTES and tokens[-1] == 131072


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_has_no_model_so_small_says_how_small_they_are(family):
    with pytest.raises(UserError, match=f"the family {family}, whose smallest model here has [0-9,]+"):
        build(family, 2000)
    with pytest.raises(UserError, match="smaller --vocab-size"):
        build(family, 1e6, vocab_size=100_000)


def test_a_family_without_sizes_is_refused():
    @dataclass
    class Fixed:
        layers: int = 12

    with pytest.raises(UserError, match="--family fixed: has no settings"):
        shape.build("fixed", Fixed, 1e8, 512)
