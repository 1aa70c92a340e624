"""The Transformer against transformers' models, against closed forms, and against black-box probes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanopre import cost, hf
from nanopre.attention import attend
from nanopre.distributed import initialise
from nanopre.loss import IGNORE, LinearCrossEntropy
from nanopre.model import ModelConfig, Transformer
from nanopre.norm import RMSNorm
from nanopre.plugins import load_plugins
from nanopre.positions import RelativeBias

transformers = pytest.importorskip("transformers")

REGISTRY = load_plugins()

GPT2 = dict(positions="learned", norm="layernorm", activation="gelu_tanh", bias=True, tie_embeddings=True)
LLAMA = dict(positions="rope", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False)


def tiny(family: dict, **changes) -> ModelConfig:
    shape = dict(vocab_size=53, seq_len=256, d_model=24, n_layers=2, n_heads=4, n_kv_heads=4, d_ff=37, norm_eps=1e-5)
    return ModelConfig(**{**shape, **family, **changes})


@torch.no_grad()
def redraw(model: torch.nn.Module, seed: int = 0, std: float = 0.08) -> torch.nn.Module:
    """Every parameter anew, far from where models start: at their first weights a wrong GELU, epsilon or bias hides."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = std * torch.randn(parameter.shape, generator=generator)
        is_norm = name.endswith("weight") and ("norm" in name.lower() or "ln_" in name)
        parameter.copy_(1 + noise if is_norm else noise)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The same function as transformers' models


def gpt2(tied: bool = True, **shape):
    shape = dict(n_positions=300, vocab_size=53, n_embd=24, n_layer=2, n_head=4) | shape
    config = transformers.GPT2Config(**shape, tie_word_embeddings=tied, attn_implementation="eager")
    return transformers.GPT2LMHeadModel(config)


def llama(kind: str = "Llama", tied: bool = False, theta: float = 10_000.0, **shape):
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4) | shape
    shape = dict(vocab_size=53, intermediate_size=37, max_position_embeddings=300, rms_norm_eps=1e-5) | shape
    config = getattr(transformers, kind + "Config")(
        **shape,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return getattr(transformers, kind + "ForCausalLM")(config)


def qwen3(**shape):
    return llama("Qwen3", **shape)


def bert(**shape):
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37) | shape
    shape = dict(vocab_size=53, max_position_embeddings=300) | shape
    # Without a pad_token_id: the embedding of that token would get no gradient, wherever it stands.
    config = transformers.BertConfig(**shape, pad_token_id=None, attn_implementation="eager")
    return transformers.BertForPreTraining(config)


def t5(version: str = "1.1", **shape):
    """Heads of width 10, so that all of them together are wider than the model."""
    shape = dict(d_model=24, d_kv=10, d_ff=37, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=53) | shape
    tied = version == "1.0"
    config = transformers.T5Config(
        **shape,
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    model = transformers.T5ForConditionalGeneration(config)
    if not tied:  # which the config does not do: a checkpoint of version 1.1 brings two different tensors
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def t5_1_0(**shape):
    return t5("1.0", **shape)


def counterpart(theirs) -> tuple[hf.Family, Transformer]:
    """Our model with the settings and weights of one of transformers, by way of hf.py's tables."""
    hf_config = theirs.config.to_dict()
    family = hf.family_of(hf_config, "config.json")
    options, seq_len = hf.read_options(family, hf_config, "config.json")
    ours = REGISTRY.get("model", family.model, "test")(**options).build(vocab_size=0, seq_len=seq_len)
    if family.model == "bert":
        ours.head.add_output("nsp", 2, pooled=True)
    ours.load_state_dict(hf.from_hf(family, theirs.state_dict(), ours.config))
    return family, ours


ORACLES = {
    "gpt2": (gpt2, {}, (3, 17)),
    "gpt2, one token": (gpt2, {}, (5, 1)),
    "gpt2, odd widths": (gpt2, dict(vocab_size=131, n_embd=21, n_head=3, n_inner=41, n_layer=3), (1, 7)),
    "gpt2, three blocks of queries": (gpt2, dict(layer_norm_epsilon=1e-2), (1, 299)),
    "gpt2, untied": (gpt2, dict(tied=False), (2, 130)),
    "llama": (llama, {}, (3, 17)),
    "llama, one token": (llama, {}, (5, 1)),
    "llama, grouped queries": (llama, dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=2), (3, 131)),
    "llama, one key head": (llama, dict(num_key_value_heads=1, vocab_size=97, rms_norm_eps=1e-2), (1, 257)),
    "llama, tied": (llama, dict(tied=True, theta=500.0), (2, 33)),
    "qk_norm": (qwen3, dict(num_key_value_heads=2), (3, 150)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_logits_and_gradients_equal_those_of_transformers(name):
    make, shape, (B, T) = ORACLES[name]
    theirs = redraw(make(**shape)).eval()
    family, ours = counterpart(theirs)
    tokens = torch.randint(theirs.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)

    expected = theirs(tokens).logits
    logits = ours(tokens)  # with gradients: attention in blocks
    assert logits.requires_grad and (logits - expected).abs().max() < 1e-4
    with torch.no_grad():  # scaled_dot_product_attention
        assert (ours(tokens) - expected).abs().max() < 1e-4

    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    (ours(tokens, loss=lambda head, h, _: head.cross_entropy(h, targets)) / targets.numel()).backward()
    gradients = hf.from_hf(family, {n: p.grad for n, p in theirs.named_parameters()}, ours.config)
    for parameter_name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[parameter_name]).abs().max()
        assert difference < 1e-5 * max(1, parameter.grad.abs().max()), parameter_name


# Shapes of (encoder, decoder) rows, and how many tokens of each encoder row are not padding.
PADDED = {
    "bert": (bert, {}, (3, 17, 0), [17, 6, 1]),
    "bert, one token": (bert, {}, (2, 1, 0), [1, 1]),
    "bert, odd widths": (bert, dict(vocab_size=131, hidden_size=21, num_attention_heads=3), (1, 7, 0), [5]),
    "bert, three blocks of queries": (bert, dict(layer_norm_eps=1e-2), (2, 259, 0), [259, 140]),
    "t5 1.1": (t5, {}, (3, 17, 9), [17, 6, 1]),
    "t5 1.1, one token": (t5, {}, (2, 1, 1), [1, 1]),
    "t5 1.1, beyond the farthest distance": (t5, dict(relative_attention_max_distance=50), (2, 140, 259), [140, 131]),
    "t5 1.1, odd widths": (t5, dict(d_model=21, num_heads=3, d_kv=7, d_ff=41, vocab_size=131), (2, 11, 23), [8, 11]),
    "t5 1.1, few buckets": (t5, dict(relative_attention_num_buckets=10, layer_norm_epsilon=1e-2), (2, 131, 5), [131, 4]),
    "t5 1.0": (t5_1_0, {}, (3, 17, 9), [17, 6, 1]),
    "t5 1.0, long": (t5_1_0, dict(num_decoder_layers=1), (2, 259, 140), [200, 259]),
}


def padded_batch(theirs, shape: tuple[int, int, int], visible: list[int]) -> tuple[dict, dict, torch.Tensor]:
    """(our model's arguments, transformers', targets) of random tokens; what is padding has random ones too."""
    B, T, D = shape
    generator = torch.Generator().manual_seed(1)
    V = theirs.config.vocab_size
    tokens, targets = (torch.randint(V, (B, n), generator=generator) for n in (T, D or T))
    ours = {"tokens": tokens, "visible": torch.tensor(visible)}
    mask = torch.arange(T) < ours["visible"][:, None]
    expected = {"input_ids": tokens, "attention_mask": mask.long()}
    if D:
        ours["decoder_tokens"] = expected["decoder_input_ids"] = torch.randint(V, (B, D), generator=generator)
    else:
        ours["segments"] = expected["token_type_ids"] = torch.randint(2, (B, T), generator=generator)
    return ours, expected, targets


@pytest.mark.parametrize("name", PADDED)
def test_padded_batches_give_the_outputs_and_gradients_of_transformers(name):
    make, sizes, shape, visible = PADDED[name]
    theirs = redraw(make(**sizes), std=0.15).eval()
    family, ours = counterpart(theirs)
    batch, their_batch, targets = padded_batch(theirs, shape, visible)
    labels = torch.arange(len(targets)) % 2

    def outputs(head, h, _):
        pairs = head.output("nsp", h, pooled=True) if make is bert else None
        return head.proj(head.before_projection(h)), pairs

    expected = theirs(**their_batch)
    expected = (expected.prediction_logits, expected.seq_relationship_logits) if make is bert else (expected.logits, None)
    with torch.no_grad():  # scaled_dot_product_attention
        fused = ours.eval()(**batch, loss=outputs)
        assert torch.equal(ours(**batch), fused[0])
    blocks = ours(**batch, loss=outputs)  # with gradients: attention in blocks
    for made in (fused, blocks):
        for output, right in zip(made, expected, strict=True):
            assert right is None or (output - right).abs().max() < 1e-4

    def total(head, h, _):
        pairs = F.cross_entropy(head.output("nsp", h, pooled=True), labels) if make is bert else 0.0
        return head.cross_entropy(h, targets) / targets.numel() + pairs

    loss = F.cross_entropy(expected[0].flatten(0, 1), targets.flatten())
    (loss + F.cross_entropy(expected[1], labels) if make is bert else loss).backward()
    ours(**batch, loss=total).backward()
    gradients = hf.from_hf(family, {n: p.grad for n, p in theirs.named_parameters()}, ours.config)
    for parameter_name, parameter in ours.named_parameters():
        difference = (parameter.grad - gradients[parameter_name]).abs().max()
        assert difference < 1e-5 * max(1, parameter.grad.abs().max()), parameter_name


def without_decoder_bias(model):
    model.head.proj.bias.zero_()


def with_segments_swapped(model):
    model.embed.segments.weight.copy_(model.embed.segments.weight.flip(0))


def with_relative_directions_swapped(model):
    bias = model.relative["bias"]
    bias.bucket = lambda offset: type(bias).bucket(bias, -offset)


def without_the_encoders_last_norm(model):
    model.blocks["1"].out_norm = torch.nn.Identity()


WRONG = {
    "bert, GELU with tanh": (bert, dict(activation="gelu_tanh")),
    "bert, epsilon": (bert, dict(norm_eps=1e-5)),
    "bert, decoder bias": (bert, without_decoder_bias),
    "bert, segments": (bert, with_segments_swapped),
    "t5, exact GELU": (t5, dict(activation="geglu")),
    "t5, epsilon": (t5, dict(norm_eps=1e-5)),
    "t5, scaled attention": (t5, dict(scale_attention=True)),
    "t5, scaled logits": (t5, dict(scale_logits=True)),
    "t5 1.0, logits not scaled": (t5_1_0, dict(scale_logits=False)),
    "t5, farthest distance": (t5, dict(relative_distance=100)),
    "t5, direction of distances": (t5, with_relative_directions_swapped),
    "t5, encoder's last norm": (t5, without_the_encoders_last_norm),
}


@pytest.mark.parametrize("detail", WRONG)
@torch.no_grad()
def test_the_comparison_of_padded_batches_sees_every_detail(detail):
    make, wrong = WRONG[detail]
    theirs = redraw(make(), std=0.15).eval()
    right = counterpart(theirs)[1].eval()
    batch, their_batch, _ = padded_batch(theirs, (2, 140, 0 if make is bert else 20), [140, 131])
    expected = theirs(**their_batch)
    expected = expected.prediction_logits if make is bert else expected.logits
    assert (right(**batch) - expected).abs().max() < 1e-4
    ours = right
    if callable(wrong):
        wrong(ours)
    else:
        ours = Transformer(replace(right.config, **wrong)).eval()
        ours.load_state_dict(right.state_dict(), strict=False)  # without the pairs' output
    assert (ours(**batch) - expected).abs().max() > 1e-4


def test_gelu_without_tanh_is_the_exact_one_of_transformers():
    theirs = redraw(gpt2(activation_function="gelu")).eval()
    theirs.config.activation_function = "gelu_new"  # our gpt2 family has no other; the built module keeps its own
    right = counterpart(theirs)[1]
    ours = Transformer(replace(right.config, activation="gelu"))
    ours.load_state_dict(right.state_dict())
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


@pytest.mark.parametrize("detail", ["norm_eps", "activation", "rope_theta", "n_kv_heads"])
def test_the_comparison_sees_every_detail(detail):
    """What the parity test would let through unseen: one wrong detail must show far above its tolerance."""
    make, wrong = {
        "norm_eps": (gpt2, dict(norm_eps=1e-6)),
        "activation": (gpt2, dict(activation="gelu")),
        "rope_theta": (llama, dict(rope_theta=9_000.0)),
        "n_kv_heads": (llama, {}),
    }[detail]
    theirs = redraw(make()).eval()
    right = counterpart(theirs)[1]
    ours = Transformer(replace(right.config, **wrong))
    ours.load_state_dict(right.state_dict())
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if detail == "n_kv_heads":  # a query head that meets its neighbour's keys
            patch.setattr("nanopre.model.attend", lambda q, k, v, *rest: attend(q, k.roll(1, 1), v, *rest))
        assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_token_moves_its_own_and_later_logits_of_its_row_alone(family, with_gradients):
    model = redraw(Transformer(tiny(family, n_kv_heads=2 if family is LLAMA else 4))).eval()
    T = 203
    tokens = torch.randint(53, (2, T), generator=torch.Generator().manual_seed(2))
    with torch.set_grad_enabled(with_gradients):
        before = model(tokens).detach()
        for j in (0, 1, 126, 127, 128, 129, T - 1):  # around the edge of the blocks of 128 queries
            changed = tokens.clone()
            changed[1, j] = (changed[1, j] + 1) % 53
            moved = (model(changed).detach() - before).abs().amax(dim=-1)  # (2, T)
            assert moved[0].max() < 1e-6
            assert (moved[1, :j] < 1e-6).all()
            assert (moved[1, j:] > 1e-6).all()


@given(
    T=st.integers(1, 270),
    cached=st.integers(0, 140),
    group=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=20, deadline=None)
def test_attention_in_blocks_equals_softmax_of_masked_scores(T, cached, group, seed):
    """Both paths, with and without earlier positions in a cache, against the textbook's formula in float64."""
    (H, H_kv), S, D = group, cached + T, 6
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, D, generator=generator) for h, n in ((H, T), (H_kv, S), (H_kv, S)))
    keys, values = (x.double().repeat_interleave(H // H_kv, dim=1) for x in (k, v))
    scores = q.double() @ keys.transpose(-2, -1) / math.sqrt(D)
    visible = torch.arange(S) <= torch.arange(T).unsqueeze(1) + cached
    expected = scores.where(visible, -math.inf).softmax(-1) @ values
    assert (attend(q, k, v) - expected).abs().max() < 1e-5
    assert (attend(q.requires_grad_(), k, v, products=True) - expected).abs().max() < 1e-5


@given(
    T=st.integers(1, 270),
    S=st.integers(1, 150),
    mode=st.sampled_from(["causal", "bidirectional", "cross"]),
    has_visible=st.booleans(),
    has_bias=st.booleans(),
    scale=st.sampled_from([None, 1.0]),
    group=st.sampled_from([(4, 4), (6, 2), (3, 1)]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_attention_with_padding_prefixes_and_biases_is_the_textbooks(T, S, mode, has_visible, has_bias, scale, group, seed):
    """Every combination, both paths, row by row in float64."""
    (H, H_kv), B, D = group, 3, 6
    S = S if mode == "cross" else T
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, n, D, generator=generator) for h, n in ((H, T), (H_kv, S), (H_kv, S)))
    visible = torch.randint(1, S + 1, (B,), generator=generator) if has_visible else None
    bias = torch.randn(H, T, S, generator=generator) if has_bias else None

    sources = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]

    keys, values = (x.double().repeat_interleave(H // H_kv, dim=1) for x in (k, v))
    scores = q.double() @ keys.transpose(-2, -1) * (scale or 1 / math.sqrt(D)) + (bias if has_bias else 0.0)

    def sees(query: int, key: int, b: int) -> bool:
        in_prefix = has_visible and key < int(visible[b])
        return in_prefix or (key <= query if mode == "causal" else not has_visible)

    mask = torch.tensor([[[[sees(i, j, b) for j in range(S)] for i in range(T)]] for b in range(B)])
    expected = scores.where(mask, -math.inf).softmax(-1) @ values
    gradient = torch.randn(expected.shape, generator=generator)
    expected_gradients = torch.autograd.grad(expected, sources, gradient.double())
    for products in (False, True):
        a = attend(q, k, v, mode == "causal", visible, bias, scale, products=products)
        assert (a - expected).abs().max() < 1e-5
        for mine, theirs in zip(torch.autograd.grad(a, sources, gradient), expected_gradients, strict=True):
            assert (mine - theirs).abs().max() < 1e-4


def test_attention_s_own_backward_pass_follows_dropout(monkeypatch):
    """Numeric differences, with the same draw each time, in parts of 3 of 8 queries and two heads of queries a key's."""
    monkeypatch.setattr("nanopre.attention.QUERIES_AT_A_TIME", 3)
    q, k, v = (torch.randn(2, heads, 8, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    bias = torch.randn(4, 8, 8, dtype=torch.float64, requires_grad=True)

    def f(*tensors):
        torch.manual_seed(0)
        return attend(*tensors[:3], bias=tensors[3], dropout=0.4, products=True)

    assert torch.autograd.gradcheck(f, (q, k, v, bias))


@given(rows=st.integers(1, 5), C=st.integers(1, 40), eps=st.sampled_from([1e-6, 1e-2]), seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_rmsnorm_on_a_cpu_is_torch_s(rows, C, eps, seed):
    """And its gradients, also of heads that lie apart in memory and in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, 3, C, generator=generator).transpose(1, 2).requires_grad_()
    gradient, norm = torch.randn(x.shape, generator=generator), RMSNorm(C, eps)
    weight = norm.weight
    torch.nn.init.normal_(weight, generator=generator)
    expected = F.rms_norm(x.double(), (C,), weight.double(), eps)
    theirs = [expected, *torch.autograd.grad(expected, (x, weight), gradient.double())]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        mine = norm(x.to(dtype))
        assert mine.dtype == dtype
        for a, b in zip([mine, *torch.autograd.grad(mine, (x, weight), gradient.to(dtype))], theirs, strict=True):
            assert (a - b).abs().max() < tolerance * (1 + b.abs().max())


BERT = dict(
    architecture="encoder", positions="learned", norm="layernorm", post_norm=True, embedding_norm=True, n_segments=2,
    transform=True, activation="gelu", bias=True, tie_embeddings=True,
)  # fmt: skip
T5 = dict(
    architecture="encoder-decoder", n_decoder_layers=2, positions="relative", norm="rmsnorm", activation="geglu_tanh",
    bias=False, tie_embeddings=False, scale_attention=False, relative_distance=64,
)  # fmt: skip
ROWS = 150, 40  # visible tokens of the two rows below


def moved(model, j: int, part: str = "tokens", **batch) -> torch.Tensor:
    """(2, T): how far the logits move when token j of the second row of `part` changes."""
    changed = batch[part].clone()
    changed[1, j] = (changed[1, j] + 1) % 53
    return (model(**{**batch, part: changed}).detach() - model(**batch).detach()).abs().amax(dim=-1)


def draw(*shape: int) -> torch.Tensor:
    return torch.randint(53, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("positions", ["learned", "rope", "relative"])
def test_an_encoders_token_moves_its_whole_row_and_padding_nothing_real(positions, with_gradients):
    model = redraw(Transformer(tiny(BERT, positions=positions))).eval()
    batch = dict(tokens=draw(2, 150), visible=torch.tensor(ROWS), segments=draw(2, 150) % 2)
    with torch.set_grad_enabled(with_gradients):
        for j in (0, 39):
            m = moved(model, j, **batch)
            assert m[0].max() < 1e-6 and (m[1] > 1e-6).all()
        for j in (40, 127, 128, 149):
            m = moved(model, j, **batch)
            assert m[0].max() < 1e-6 and m[1, :40].max() < 1e-6 and m[1, j] > 1e-6


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_decoder_sees_the_encoders_real_tokens_and_its_own_past(with_gradients):
    model = redraw(Transformer(tiny(T5))).eval()
    batch = dict(tokens=draw(2, 150), visible=torch.tensor(ROWS), decoder_tokens=draw(2, 131))
    with torch.set_grad_enabled(with_gradients):
        for j in (0, 39):
            m = moved(model, j, **batch)
            assert m[0].max() < 1e-6 and (m[1] > 1e-6).all()
        for j in (40, 128, 149):
            assert moved(model, j, **batch).max() < 1e-6
        for j in (0, 127, 128, 130):
            m = moved(model, j, "decoder_tokens", **batch)
            assert m[0].max() < 1e-6 and m[1, :j].sum() < 1e-5 and (m[1, j:] > 1e-6).all()


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_decoders_prefix_sees_itself_in_both_directions(with_gradients):
    model = redraw(Transformer(tiny(LLAMA))).eval()
    batch = dict(tokens=draw(2, 150), visible=torch.tensor(ROWS))
    with torch.set_grad_enabled(with_gradients):
        for j in (0, 39):
            assert (moved(model, j, **batch)[1] > 1e-6).all()
        for j in (40, 128):
            m = moved(model, j, **batch)[1]
            assert m[:j].max() < 1e-6 and (m[j:] > 1e-6).all()


@given(
    buckets=st.integers(4, 64),
    distance=st.integers(33, 300),
    bidirectional=st.booleans(),
    T=st.integers(1, 40),
    past=st.integers(0, 400),
)
@settings(max_examples=60, deadline=None)
def test_relative_biases_are_in_the_buckets_of_transformers(buckets, distance, bidirectional, T, past):
    buckets -= buckets % 2
    config = tiny(T5, relative_buckets=buckets, relative_distance=distance)
    bias, S = redraw(RelativeBias(config, bidirectional)), past + T
    offsets = torch.arange(S) - torch.arange(past, S)[:, None]
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    right = bucket(offsets, bidirectional=bidirectional, num_buckets=buckets, max_distance=distance)
    assert torch.equal(bias.bucket(offsets), right)
    assert torch.equal(bias(T, S), bias.weight[right].permute(2, 0, 1))


def test_blocks_leave_out_scores_that_causality_hides():
    """4 blocks of 128 queries see 128, 256, 384 and 512 keys: 10/16 of all scores, in each of two products."""
    q, k, v = (torch.randn(1, 1, 512, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, products=True)
    assert counter.get_total_flops() == 2 * (2 * 512 * 512 * 8) * 10 / 16


@pytest.mark.parametrize("with_gradients", [True, False])
def test_dropout_falls_on_attention_in_training_alone(with_gradients):
    model = redraw(Transformer(tiny(GPT2, dropout=0.5)))
    tokens = torch.arange(30).unsqueeze(0)
    with torch.set_grad_enabled(with_gradients):
        model.eval()
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # only the attention's own is left
        assert not torch.equal(model(tokens), model(tokens))


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.fixture(scope="module")
def chunk():
    """Sets how many logits are held at once; hypothesis' examples share the fixture and set it anew."""
    with pytest.MonkeyPatch.context() as patch:
        yield lambda logits: patch.setattr(LinearCrossEntropy, "LOGITS_PER_CHUNK", logits)


def head(V: int, C: int, seed: int = 0):
    return redraw(Transformer(tiny(LLAMA, vocab_size=V, d_model=C, n_heads=1, n_kv_heads=1, n_layers=1)), seed).head


@given(
    N=st.integers(0, 40),
    V=st.integers(1, 30),
    C=st.sampled_from([2, 8]),
    logits=st.integers(1, 1300),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_chunked_cross_entropy_equals_the_plain_one(chunk, N, V, C, logits, ignored, seed):
    chunk(logits)
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(N, C, generator=generator, requires_grad=True)
    weight = torch.randn(V, C, generator=generator, requires_grad=True)
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = IGNORE

    total = LinearCrossEntropy.apply(h, weight, None, targets, False)[0]
    gradients = torch.autograd.grad(3 * total, (h, weight))  # 3: a gradient that comes from above is passed on
    expected = F.cross_entropy(h @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    wanted = torch.autograd.grad(3 * expected, (h, weight))

    assert total.dtype == torch.float32 and total.shape == ()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-4)
    if ignored == 1.0:
        assert total == 0 and not gradients[0].any() and not gradients[1].any()


def test_extreme_logits_give_finite_losses_and_gradients():
    h = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    total = LinearCrossEntropy.apply(h, torch.eye(2, requires_grad=True), None, torch.tensor([1, 1]), False)[0]
    total.backward()
    assert total == 1e4
    assert torch.equal(h.grad, torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    """Sum of what two untied weights of the same values get."""
    tied = redraw(Transformer(tiny(GPT2)))
    untied = Transformer(tiny(GPT2, tie_embeddings=False))
    untied.load_state_dict(tied.state_dict())
    tokens, targets = torch.arange(20).view(2, 10), torch.arange(20).view(2, 10) + 1
    for model in (tied, untied):
        model(tokens, loss=lambda head, h, _: head.cross_entropy(h, targets)).backward()
    both = untied.embed.tokens.weight.grad + untied.head.proj.weight.grad
    assert untied.embed.tokens.weight.grad.abs().max() > 0.01
    torch.testing.assert_close(tied.embed.tokens.weight.grad, both, rtol=1e-5, atol=1e-5)


def test_bfloat16_autocast_is_near_float32_and_gives_float32(chunk):
    chunk(700)
    weight = 0.3 * torch.randn(90, 16, generator=torch.Generator().manual_seed(0))
    h = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(64)
    results = []
    for on in (False, True):
        leaves = [h.clone().requires_grad_(), weight.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            total = LinearCrossEntropy.apply(*leaves, None, targets, False)[0]
        total.backward()
        results.append((total.detach(), *(leaf.grad for leaf in leaves)))
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(exact, rounded)  # the products did run in bfloat16
        assert (exact - rounded).norm() < 0.01 * exact.norm()  # whose unit roundoff is 2**-8 = 0.004


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_the_logits_of_a_batch_are_never_held_whole(chunk):
    V, N, C = 1000, 512, 8
    chunk(32 * V)
    part = head(V, C)
    h, targets = torch.randn(4, N // 4, C, requires_grad=True), torch.zeros(4, N // 4, dtype=torch.long)
    with LargestTensor() as largest:
        part.cross_entropy(h, targets).backward()
    assert largest.numel == 32 * V  # one chunk, not N * V
    with LargestTensor() as plain:
        F.cross_entropy(part.proj(h).flatten(0, 1), targets.flatten()).backward()
    assert plain.numel == N * V  # the probe sees what it is to see


def test_evaluation_computes_no_gradient():
    V, N, C = 100, 64, 8
    part = head(V, C)
    targets = torch.zeros(N, dtype=torch.long)

    def flops(h):
        with FlopCounterMode(display=False) as counter:
            part.cross_entropy(h, targets)
        return counter.get_total_flops()

    assert flops(torch.randn(N, C, requires_grad=True)) == 3 * 2 * N * V * C
    with torch.no_grad():
        assert flops(torch.randn(N, C)) == 2 * N * V * C


# ---------------------------------------------------------------------------------------------------------------------
# First weights, and how many


def test_first_weights_have_the_stated_spread():
    config = tiny(GPT2, d_model=96, n_layers=3, n_heads=4, d_ff=200, vocab_size=500)
    model = Transformer(config)
    initialise(model, seed=5)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.02
            n = parameter.numel()
            assert abs(parameter.std().item() / std - 1) < 4.4 / math.sqrt(2 * n), name
            assert abs(parameter.mean().item()) < 4.4 * std / math.sqrt(n), name


def test_half_of_the_heads_of_rotary_attention_with_biases_begin_near():
    """By the attention's own scores: with products of weight 0 a query's preference is that of the biases alone."""
    config = tiny(BERT, positions="rope", d_model=96, n_heads=3, n_kv_heads=3, seq_len=8)
    model = Transformer(config)
    initialise(model, seed=5)
    attention = model.blocks["1"].attn
    for layer in (attention.q, attention.k):
        layer.weight.data.zero_()
    attention.out = attention.v = torch.nn.Identity()  # values that name the keys, and what is read of them
    values = F.pad(torch.eye(8), (0, 24)).repeat(1, 3)[None]
    read = attention(values).view(8, 3, 32)[:, :, :8].transpose(0, 1)  # (head, query, key)
    distance = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    for weights in read[:2]:
        means = [weights[distance == d].mean().item() for d in range(8)]
        assert means[0] > means[1] > 1 / 8 > means[2] > max(means[3:])
    torch.testing.assert_close(read[2], torch.full((8, 8), 1 / 8))
    for other in (tiny(BERT), tiny(BERT, positions="rope", bias=False)):
        model = Transformer(other)
        initialise(model, seed=5)
        assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_first_weights_depend_on_the_seed_and_the_name_alone():
    whole, stage = Transformer(tiny(LLAMA, qk_norm=True)), Transformer(tiny(LLAMA, qk_norm=True))
    del stage.embed, stage.blocks["0"]  # as on the last of two pipeline stages
    initialise(whole, seed=5)
    initialise(stage, seed=5)
    weights = dict(whole.named_parameters())
    for name, parameter in stage.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert not torch.equal(weights["blocks.0.mlp.up.weight"], weights["blocks.1.mlp.up.weight"])
    again = Transformer(tiny(LLAMA, qk_norm=True))
    initialise(again, seed=6)
    assert not torch.equal(again.embed.tokens.weight, whole.embed.tokens.weight)


# The counts that the models' authors, or their published checkpoints, state.
PUBLISHED = {
    "GPT-2 small": (124_439_808, GPT2, (50_257, 1024, 768, 12, 12, 12, 3072)),
    "GPT-2 XL": (1_557_611_200, GPT2, (50_257, 1024, 1600, 48, 25, 25, 6400)),
    "LLaMA 7B": (6_738_415_616, LLAMA, (32_000, 2048, 4096, 32, 32, 32, 11_008)),
    "Llama 3 8B": (8_030_261_248, LLAMA, (128_256, 8192, 4096, 32, 32, 8, 14_336)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name):
    number, family, (V, T, C, n_layers, H, H_kv, d_ff) = PUBLISHED[name]
    config = ModelConfig(V, T, C, n_layers, H, H_kv, d_ff, norm_eps=1e-5, **family)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == number
    assert cost.parameters(config)["total"] == number


@pytest.mark.parametrize(
    "make, sizes, millions",
    [
        (bert, {}, 110),
        (bert, dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096), 336),
        (t5, {}, 248),
        (t5_1_0, {}, 223),
    ],
    ids=["bert-base", "bert-large", "t5-v1.1-base", "t5-base"],
)
def test_encoders_have_as_many_parameters_as_those_of_transformers(make, sizes, millions):
    """With both of BERT's heads. The paper says 340 million."""
    base = dict(vocab_size=30_522, max_position_embeddings=512, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                intermediate_size=3072)  # fmt: skip
    if make is not bert:
        base = dict(vocab_size=32_128, d_model=768, d_kv=64, num_layers=12, num_decoder_layers=12, num_heads=12,
                    d_ff=3072 if make is t5_1_0 else 2048)  # fmt: skip
    with torch.device("meta"):
        theirs = make(**base | sizes)
        hf_config = theirs.config.to_dict()
        family = hf.family_of(hf_config, "config.json")
        options, seq_len = hf.read_options(family, hf_config, "config.json")
        ours = REGISTRY.get("model", family.model, "test")(**options).build(vocab_size=0, seq_len=seq_len)
        if make is bert:
            ours.head.add_output("nsp", 2, pooled=True)
    total = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.parameters()) == total and round(total / 1e6) == millions
    C = ours.config.d_model
    assert cost.parameters(ours.config)["total"] == total - (C * C + C + 2 * C + 2 if make is bert else 0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_parameters_are_counted_in_closed_form(family, bias, tied, qk_norm):
    n_kv_heads = 2 if family is LLAMA else 4
    config = tiny({**family, "bias": bias, "tie_embeddings": tied, "qk_norm": qk_norm}, n_kv_heads=n_kv_heads)
    assert cost.parameters(config)["total"] == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(n_heads=5), "n_heads = 5 does not divide d_model = 24"),
        (dict(n_kv_heads=3), "n_kv_heads = 3 does not divide n_heads = 4"),
        (dict(n_heads=0), "n_heads = 0 must be at least 1"),
        (dict(n_layers=0), "n_layers = 0 must be at least 1"),
        (dict(d_model=-32), "d_model = -32 must be at least 1"),
        (dict(dropout=2), "^dropout = 2 must be at least 0 and below 1"),
        (dict(norm_eps=-1), "norm_eps = -1 must be at least 0"),
        (dict(norm_eps=math.nan), "norm_eps = nan must be at least 0"),
        (dict(rope_theta=0), "rope_theta = 0 must be greater than 0"),
        (dict(d_head=-4), "d_head = -4 must be at least 0"),
        (dict(architecture="encoder-decoder", n_decoder_layers=-1), "n_decoder_layers = -1 must be at least 1"),
        (dict(positions="relative", relative_buckets=3), "relative_buckets = 3 must be at least 4"),
        (dict(positions="relative", relative_distance=16), "relative_distance = 16 must be at least 17"),
        (dict(d_model=12), "d_model / n_heads = 3 must be even for rotary positions"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(LLAMA, **changes)
