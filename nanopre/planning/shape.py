"""From a number of parameters to a model: depth, width, heads and vocabulary of a family."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from nanopre import UserError, config as configs
from nanopre.cost import parameters
from nanopre.distributed import padded_vocabulary
from nanopre.model import ModelConfig

RULE = (
    "d_model / n_layers = 64 up to 1e8 parameters, 128 from 7e9 on, as GPT-2, GPT-3 and LLaMA have it, even in log N between "
    "(the loss hardly depends on it: Kaplan et al., 2020, section 3.2; it should grow: Levine et al., 2020)"
)
WIDTH_STEPS = ((256, 32), (1024, 64), (4096, 256), (math.inf, 1024))
"""Below which width d_model is a multiple of what. From 4,096 on there are 8, 16, 24 ... heads of 128, which 8 heads of keys
and values, and 8 ranks of tensor parallelism, share out evenly."""
DEPTH_STEPS = ((12, 1), (32, 2), (math.inf, 4))  # the same of n_layers, so that pipelines share it out
MLP_STEPS = ((256, 16), (1024, 32), (math.inf, 128))  # and of d_ff
HEAD_WIDTHS = ((256, 32), (2048, 64), (math.inf, 128))
GROUPED = 4096  # d_model from which 8 heads of keys and values serve all queries (LLaMA 2 70B, LLaMA 3)
TIED = 1e9  # parameters below which the output projection is the embedding (GPT-2; the small LLaMA 3.2 and Qwen models)
BYTES = 361  # tokens of the smallest vocabulary: the 256 bytes and the special tokens
VOCABULARIES = [BYTES, *(2**k for k in range(9, 18))]  # up to 131,072


def build(
    name: str, family: type, n: float, seq_len: int, vocab_size: int = 0, multiple: int = 64, counted: str = "total"
) -> tuple[dict[str, Any], int, ModelConfig]:
    """(options of [model] for about `n` parameters; tokens of the vocabulary; the model's settings).

    name, family: the plugin. Each of the options that it does not have is left out.
    vocab_size: the tokenizer's; 0: the largest of VOCABULARIES that leaves four fifths of the parameters to the blocks.
        LLaMA 3 8B (128,256 tokens, 13% of the parameters) and TinyLlama 1.1B (32,000, 12%) keep to that.
    multiple: the rows of the embedding are rounded up to a multiple of it.
    counted: which of nanopre.cost.parameters are to be `n`: "total", or "blocks" where embeddings do not count.

    Of all pairs of depth and width near the rule it takes the one with the least |log(parameters / n)|, plus a tenth of
    |log(aspect ratio / the rule's)|: being 3% too large counts as much as being 30% too wide. What is then left of the
    difference goes into d_ff, up to a sixth of what the family has.

    Raises UserError where the family's smallest model has more than 4/3 n parameters.
    """
    known = {f.name for f in dataclasses.fields(family)}
    if not {"d_model", "n_layers", "n_heads", "vocab_size"} <= known or not hasattr(family, "settings"):
        raise UserError(
            f"--family {name}: has no settings(), or lacks one of the options d_model, n_layers, n_heads and vocab_size, by "
            "which a shape is found; choose another one, llama for example."
        )

    def size(**options) -> int:
        return parameters(family(**options).settings(options["vocab_size"], seq_len))[counted]

    aspect = aspect_ratio(n)
    candidates = []
    for d_model in widths((aspect * n / 12) ** (1 / 3)):  # a block has about 12 d_model**2 parameters
        options = {"d_model": d_model, "n_layers": 1, **heads(d_model)}
        if n < TIED:
            options["tie_embeddings"] = True
        options = {key: value for key, value in options.items() if key in known}
        tables = 1 if family(**options).settings(1, 1).tie_embeddings else 2
        small = [v for v in VOCABULARIES if tables * v * d_model <= n / 5]
        tokens = vocab_size or max(small, default=BYTES)
        options["vocab_size"] = -(-tokens // multiple) * multiple

        one, two = (size(**options | {"n_layers": k}) for k in (1, 2))
        layers = max(1.0, 1 + (n - one) / (two - one))
        step = below(DEPTH_STEPS, layers)
        for n_layers in (step * math.floor(layers / step), step * math.ceil(layers / step)):
            off = abs(math.log((one + (n_layers - 1) * (two - one)) / n))
            off += 0.1 * abs(math.log(d_model / n_layers / aspect))
            candidates.append((off, {**options, "n_layers": n_layers}, tokens))
    _, options, tokens = min(candidates, key=lambda candidate: candidate[0])
    config = family(**options).settings(tokens, seq_len)
    if "d_ff" in known:
        unit = below(MLP_STEPS, options["d_model"])
        units = round((n - size(**options)) / (size(**options, d_ff=config.d_ff + unit) - size(**options)))
        most = config.d_ff // 6 // unit
        options["d_ff"] = config.d_ff + unit * max(-most, min(most, units))
        config = family(**options).settings(tokens, seq_len)
    total = parameters(config)[counted]
    if total > 4 / 3 * n:
        smaller = ", or a smaller --vocab-size" if vocab_size > BYTES else ""
        raise UserError(
            f"{n:.3g} parameters are too few for the family {name}, whose smallest model here has {total:,}; it takes a larger "
            f"budget{smaller}."
        )
    return options, tokens, config


def aspect_ratio(n: float) -> float:
    """d_model / n_layers for n parameters, by RULE."""
    return 64 * 2 ** min(1.0, max(0.0, math.log(n / 1e8) / math.log(7e9 / 1e8)))


def widths(ideal: float) -> Iterator[int]:
    """Values of d_model within a factor of 2 of the ideal one, and at least the smallest."""
    d_model = 32
    while d_model == 32 or d_model <= 2 * ideal:
        if d_model == 32 or d_model >= ideal / 2:
            yield d_model
        d_model += below(WIDTH_STEPS, d_model)


def heads(d_model: int) -> dict[str, int]:
    head_dim = below(HEAD_WIDTHS, d_model)
    grouped = {"n_kv_heads": 8} if d_model >= GROUPED else {}
    return {"n_heads": d_model // head_dim, "d_head": head_dim, **grouped}


def below(table: tuple[tuple[float, int], ...], size: float) -> int:
    """What a table of (bound, value) has for the first bound that is larger."""
    return next(value for bound, value in table if size < bound)


def scaled(config: configs.Config, params: float, n_vocab: int) -> tuple[dict[str, Any], ModelConfig]:
    """([model] of a config, its settings) for the model nearest to `params`, embeddings included, that has the proportions of
    the config's: the same width of a head and d_model / n_layers, and d_ff in step. One shape at every size, so that a law
    sees size alone."""
    base, plugin, n_rows = configs.to_dict(config)["model"], config.model, padded_vocabulary(n_vocab)
    if "mup_base_width" not in base:
        raise UserError(
            f'model.name = {base["name"]} has no mup_base_width, by which a learning rate fits every width; take "llama".'
        )
    settings = plugin.settings(n_rows, config.train.seq_len)
    aspect, group = settings.d_model / settings.n_layers, settings.n_heads // settings.n_kv_heads
    nearest, least = None, math.inf
    for n_heads in itertools.count(1):
        d_model = n_heads * settings.head_dim
        options = {
            **base,
            "d_model": d_model,
            "n_layers": max(1, round(d_model / aspect)),
            "n_heads": n_heads,
            "d_ff": base["d_ff"] * d_model // settings.d_model,
            "mup_base_width": base["mup_base_width"] or settings.d_model,
        }
        if "n_kv_heads" in base:
            options["n_kv_heads"] = n_heads // math.gcd(n_heads, group)
        built = type(plugin)(**{key: value for key, value in options.items() if key != "name"})
        found = built.settings(n_rows, config.train.seq_len)
        distance = math.log(parameters(found)["total"] / params)
        if abs(distance) < least:
            nearest, least = (options, found), abs(distance)
        if distance > 0:
            return nearest
