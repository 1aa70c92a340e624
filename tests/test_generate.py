"""Decoding: the cache changes nothing, and each way to choose a token follows its definition."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanopre.config import Train
from nanopre.distributed import initialise
from nanopre.generate import choose, generate
from nanopre.machine import PackedLinear, has_fast_bfloat16, lighten
from nanopre.model import ModelConfig, Transformer

SETTINGS = dict(vocab_size=61, seq_len=24, d_model=32, n_layers=2, n_heads=4, d_ff=64, norm_eps=1e-5)
GPT2 = ModelConfig(
    **SETTINGS,
    n_kv_heads=4,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    bias=True,
    tie_embeddings=True,
)
LLAMA = ModelConfig(
    **SETTINGS,
    n_kv_heads=2,
    positions="rope",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
    qk_norm=True,
)

T5 = ModelConfig(
    **SETTINGS,
    n_kv_heads=4,
    architecture="encoder-decoder",
    n_decoder_layers=2,
    positions="relative",
    norm="rmsnorm",
    activation="geglu_tanh",
    bias=False,
    tie_embeddings=False,
)


def make_model(config: ModelConfig, seed: int) -> Transformer:
    model = Transformer(config)
    initialise(model, seed)
    for parameter in model.parameters():  # larger weights: the likeliest token changes with the context
        parameter.data.mul_(5)
    return model.eval()


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("prompt_length", [1, 7, 23, 24, 40])
def test_greedy_output_is_the_same_with_and_without_the_cache(config, prompt_length):
    # 60 tokens after the prompt: more than twice the context of 24, so that its older half is dropped several times.
    model = make_model(config, seed=prompt_length)
    prompt = torch.randint(0, 61, (prompt_length,), generator=torch.Generator().manual_seed(0)).tolist()
    with_cache = list(generate(model, prompt, 60, temperature=0))
    without = list(generate(model, prompt, 60, temperature=0, use_cache=False))
    assert with_cache == without
    assert len(set(with_cache)) > 3  # not one token over and over, which any cache would give


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_greedy_output_follows_the_argmax_of_the_whole_sequence(config):
    model = make_model(config, seed=1)
    sequence = [5, 3, 8]
    expected = []
    for _ in range(20):  # within seq_len: no context is dropped
        expected.append(int(model(torch.tensor([sequence + expected]))[0, -1].argmax()))
    assert list(generate(model, sequence, 20, temperature=0)) == expected


def test_a_prompt_whose_tokens_see_each_other_is_continued_as_in_training():
    model, prompt, expected = make_model(LLAMA, seed=4), [5, 3, 8, 13], []
    for _ in range(15):
        logits = model(torch.tensor([prompt + expected]), visible=torch.tensor([len(prompt)]))
        expected.append(int(logits[0, -1].argmax()))
    assert list(generate(model, prompt, 15, temperature=0, bidirectional_prompt=True)) == expected
    assert list(generate(model, prompt, 15, temperature=0, bidirectional_prompt=True, use_cache=False)) == expected
    assert list(generate(model, prompt, 15, temperature=0)) != expected


@pytest.mark.parametrize("source_length", [1, 24])
def test_an_encoder_decoder_reads_its_source_once(source_length):
    model, source, expected = make_model(T5, seed=5), list(range(source_length)), []
    for _ in range(20):
        logits = model(torch.tensor([source]), decoder_tokens=torch.tensor([[60] + expected]))
        expected.append(int(logits[0, -1].argmax()))
    calls = []
    model.blocks["0"].register_forward_hook(lambda *_: calls.append(1))
    assert list(generate(model, [60], 20, temperature=0, source=source)) == expected
    assert len(calls) == 1
    assert list(generate(model, [60], 20, temperature=0, source=source, use_cache=False)) == expected
    assert list(generate(model, [60], 20, temperature=0, source=source[::-1] + [7])) != expected
    # 60 tokens: more than twice seq_len, so that the decoder drops the older half of its context several times.
    long = [list(generate(model, [60], 60, temperature=0, source=source, use_cache=cached)) for cached in (True, False)]
    assert long[0] == long[1] and len(set(long[0])) > 3


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_lighter_weights_choose_tokens_that_the_whole_ones_would(config):
    model, whole = make_model(config, seed=5), make_model(config, seed=5)
    lighten(model, Train(precision="float32"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))
    lighten(model, Train(precision="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and {b.dtype for b in model.buffers()} <= {torch.float32}
    sequence = [5, 3, 8]
    for token in generate(model, sequence, 20, temperature=0):
        logits = whole(torch.tensor([sequence]))[0, -1]
        # As likely as any but for the rounding to 8 bits; a token at random is half of the spread away.
        assert logits.max() - logits[token] < 0.05 * (logits.max() - logits.min())
        sequence = [*sequence, token]


def test_packed_weights_change_no_logit():
    """Prompts of one token and more, a head with a bias, and weights that the embedding shares."""
    if not has_fast_bfloat16(torch.device("cpu")):
        pytest.skip("no fast bfloat16 products on this CPU: weights are not packed")
    for config in (GPT2, LLAMA, T5, dataclasses.replace(GPT2, transform=True)):
        plain = make_model(config, seed=5)
        for name, parameter in plain.named_parameters():
            parameter.data = (parameter.data.normal_() if name.endswith("bias") else parameter.data).bfloat16()
        packed = copy.deepcopy(plain)
        lighten(packed, Train(precision="bfloat16"))
        assert any(isinstance(m, PackedLinear) for m in packed.modules())
        assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
        for length in (1, 7):
            tokens = torch.arange(3, 3 + length)[None]
            inputs = {"tokens": tokens} if config is not T5 else {"tokens": tokens, "decoder_tokens": tokens}
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                torch.testing.assert_close(packed(**inputs), plain(**inputs), rtol=0.02, atol=0.02)


def test_draws_depend_on_the_seed_alone():
    model = make_model(LLAMA, seed=2)

    def draw(seed, use_cache=True):
        return list(generate(model, [1], 30, generator=torch.Generator().manual_seed(seed), use_cache=use_cache))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_stop_ends_the_sequence_and_padding_is_never_chosen():
    model = make_model(LLAMA, seed=3)
    tokens = list(generate(model, [1], 40, temperature=0))
    stop = tokens[5]
    assert list(generate(model, [1], 40, temperature=0, stop=stop)) == tokens[: tokens.index(stop)]
    generator = torch.Generator().manual_seed(0)
    assert max(generate(model, [1], 200, temperature=5.0, generator=generator, n_vocab=10)) < 10


@given(st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=30), st.integers(1, 30), st.floats(0.05, 1))
@settings(deadline=None)
def test_top_k_and_top_p_keep_exactly_the_tokens_of_their_definition(logits, k, p):
    logits = torch.tensor(logits)
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    probabilities = logits[order].softmax(0)
    nucleus, held = set(), 0.0
    for token, probability in zip(order, probabilities.tolist(), strict=True):
        if held < p - 1e-5 or not nucleus:
            nucleus.add(token)
        held += probability
    allowed = {i for i in range(len(logits)) if any(logits[i] == logits[j] for j in nucleus)}  # ties are as good
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, 1.0, k, p, generator) for _ in range(50)}
    borderline = {t for t in order if abs(sum(q for u, q in zip(order, probabilities.tolist(), strict=True)
                  if order.index(u) < order.index(t)) - p) < 1e-5}  # fmt: skip
    assert drawn <= allowed | borderline


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    n = 4000
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(0)
        drawn = torch.bincount(
            torch.tensor([choose(logits, temperature, 0, 1.0, generator) for _ in range(n)]), minlength=4
        )
        error = (expected * (1 - expected) / n).sqrt()
        assert ((drawn / n - expected).abs() < 4.4 * error + 1e-9).all()
    assert choose(logits, 0, 0, 1.0, None) == 2
