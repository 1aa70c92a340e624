"""What blocks keep: the count of activations.py against torch's own accounting, and against the paper's closed forms."""

from __future__ import annotations

import pytest
import torch
from test_memory import HERE, PLUGINS, held
from torch import nn

from nanopre.distributed import initialise
from nanopre.planning import activations
from nanopre.planning.activations import Kernels, Tokens

C, F, H = 32, 48, 4


def build(family: str, n_layers: int, T: int, mode: str, **options):
    options = {"d_model": C, "d_ff": F, "n_heads": H, "n_layers": n_layers, **options}
    model = PLUGINS.get("model", family, "test")(**options).build(vocab_size=96, seq_len=T)
    initialise(model, 0)
    HERE.choose_attention(model)
    (model,) = PLUGINS.get("parallel", "activation_checkpointing", "test")(mode).apply([model], None)
    return model


MODELS = {
    "gpt2": {},
    "gpt2 with dropout": {"dropout": 0.1, "activation": "gelu", "bias": False},
    "llama": {},
    "llama with groups": {"n_kv_heads": 2, "qk_norm": True},
    "llama with one key": {"n_kv_heads": 1},
    "bert": {},
    "t5": {"d_head": 8},
    "t5 with relu": {"d_head": 6, "activation": "relu"},
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows, T, mode", [(2, 64, "none"), (1, 200, "none"), (2, 200, "selective"), (2, 64, "full")])
def test_a_block_keeps_what_the_count_says(name, precision, rows, T, mode):
    """To 64 bytes, which are scalars; and besides the 5,056 of the random state where a block is computed again."""
    family, options, size = name.split()[0], MODELS[name], torch.finfo(getattr(torch, precision)).bits // 8
    stacks = [("n_layers", "bidirectional"), ("n_decoder_layers", "decoder")] if family == "t5" else [("n_layers", "causal")]
    for depth, kind in stacks:
        counts = {"n_layers": 2, **({"n_decoder_layers": 2} if family == "t5" else {})}
        models = [build(family, **{**options, **counts, depth: n}, T=T, mode=mode) for n in (2, 3)]
        small, large = (held(model, rows, T, precision) for model in models)
        c = models[0].config
        kind = "bidirectional" if family == "bert" else kind
        x = Tokens(rows, T, T if kind == "decoder" else 0, visible=family == "bert")
        k = activations.kernels("cpu", size)
        expected = activations.stream(c, k, x)
        if mode == "none":
            block = models[0].blocks["2" if kind == "decoder" else "0"]
            weights = [layer.weight for layer in block.modules() if isinstance(layer, nn.Linear)]
            expected = activations.block(c, k, x, kind) + (2 * sum(w.numel() for w in weights) if size == 2 else 0)
        else:
            expected += torch.get_rng_state().nbytes
            expected += activations.products(c, k, x, kind) if mode == "selective" else 0
        assert abs(large - small - expected) <= 64, (depth, large - small, expected)


def test_the_paper_s_closed_forms():
    """Korthikanti et al. (2022), table 2, for GPT with dropout, 16 bits a number and one byte a dropout mask. It leaves out
    the norms' statistics and the causal mask, which is the same for all rows and heads: together below 1%."""
    gpt = PLUGINS.get("model", "gpt2", "test")
    for s, b, h, a, t in ((2048, 1, 12288, 96, 8), (1024, 4, 6144, 64, 8), (512, 2, 1024, 16, 2)):
        c = gpt(d_model=h, n_heads=a, n_layers=1, dropout=0.1).settings(512, s)
        stored, fused = Kernels(2, 2, queries=s, mask=1), Kernels(2, 2, queries=0, mask=1)
        sbh, scores = s * b * h, 5 * a * s / h

        def kept(k, a=a, b=b, s=s, c=c, **split):
            return activations.block(c, k, Tokens(b, s, **split), "causal")

        assert kept(stored) == pytest.approx(sbh * (34 + scores), rel=0.01)
        assert kept(stored, tensor=t) == pytest.approx(sbh * (10 + 24 / t + scores / t), rel=0.01)
        # The paper gathers the sequence again in the backward pass; here the gathered inputs of attention and MLP stay.
        whole = 4 * (1 - 1 / t)
        assert kept(stored, tensor=t, sequence_parallel=True) == pytest.approx(sbh * (34 / t + scores / t + whole), rel=0.01)
        # Without scores, which is the paper's selective recomputation: one kernel does attention, and keeps a number a row.
        statistics = 4 * b * a * s
        assert kept(fused) - statistics == pytest.approx(sbh * 34, rel=0.01)
        assert kept(fused, tensor=t) - statistics / t == pytest.approx(sbh * (10 + 24 / t), rel=0.01)
        assert activations.stream(c, stored, Tokens(b, s)) == 2 * sbh  # full recomputation
