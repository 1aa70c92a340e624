"""Continue a sequence token by token, with a cache of keys and values; fill in what is missing of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from nanopre import UserError
from nanopre.model import ModelConfig, Transformer
from nanopre.tokenizer import Tokenizer


class LayerCache:
    """One layer's keys and values of all positions so far, in buffers (1, H_kv, capacity, D) that are made once."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        shape = (1, config.n_kv_heads, config.seq_len, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.length = 0
        self.source: tuple[Tensor, Tensor] | None = None  # keys and values of an encoder's output

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (1, H_kv, T, D) and return all, (1, H_kv, length, D)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class KeyValueCache:
    """The decoder's layers' caches by the names of the blocks."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        n = config.n_layers
        names = range(n) if config.architecture == "decoder" else range(n, n + config.n_decoder_layers)
        self.layers = {str(i): LayerCache(config, dtype, device) for i in names}

    def __getitem__(self, name: str) -> LayerCache | None:
        """None for a block of an encoder, which has no use for one."""
        return self.layers.get(name)

    @property
    def length(self) -> int:
        """Positions held, which is the position of the next token. The first block has extended its own cache already
        when the second runs; `embed` asks before all of them, and a block asks its own layer."""
        return next(iter(self.layers.values())).length


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    n_vocab: int | None = None,
    stop: int | None = None,
    use_cache: bool = True,
    source: list[int] | None = None,
    bidirectional_prompt: bool = False,
) -> Iterator[int]:
    """Yield up to `max_tokens` tokens after `prompt` (at least one token), as they are made.

    source: what an encoder-decoder reads; `prompt` is then how its decoder starts.
    bidirectional_prompt: the prompt's tokens see each other, as in a decoder that was trained by prefix LM.

    temperature 0 is greedy; top_k keeps the k likeliest tokens (0: all), then top_p the fewest that hold this much
    probability. Ids from `n_vocab` on, the padding of the vocabulary, are never chosen; `stop` ends the sequence and is
    not yielded. When the model's `seq_len` is full, the older half of the context is dropped. Without the cache every
    step recomputes the same context, which gives the same tokens.
    """
    model.eval()
    parameter = next(model.parameters())
    device, seq_len = parameter.device, model.config.seq_len
    context = list(prompt[-seq_len:])
    cache, unseen = None, context  # what the cache, if any, does not hold yet
    visible = torch.tensor([len(context)], device=device) if bidirectional_prompt else None
    encoder_tokens = None if source is None else torch.tensor([source], device=device)
    for _ in range(max_tokens):
        if len(context) == seq_len + 1:
            context = context[-(seq_len // 2 + 1) :]
            cache, unseen = None, context
        if use_cache and cache is None:
            cache = KeyValueCache(model.config, parameter.dtype, device)
        tokens = torch.tensor([unseen if use_cache else context], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=parameter.dtype == torch.bfloat16):
            if encoder_tokens is None:
                logits = model(tokens, cache=cache, visible=visible)
            else:  # the cache keeps what the decoder needs of the encoder
                again = cache is None or cache.length == 0
                logits = model(encoder_tokens if again else None, decoder_tokens=tokens, cache=cache)
        token = choose(logits[0, -1, :n_vocab].float(), temperature, top_k, top_p, generator)
        if token == stop:
            return
        yield token
        context.append(token)
        unseen = [token]


def answer(model: Transformer, tokenizer: Tokenizer, source: list[int], **options) -> Iterator[int]:
    """Yield the tokens that a model writes for a source which it reads in both directions: an encoder-decoder's decoder from
    the padding on, a decoder of one stack behind the source itself. `options` are those of `generate`."""
    options = {"n_vocab": tokenizer.n_vocab, "stop": tokenizer.eot, **options}
    if model.config.architecture == "encoder-decoder":
        return generate(model, [tokenizer.pad], source=source, **options)
    return generate(model, source, bidirectional_prompt=True, **options)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> int:
    """Draw a token from logits (V,): the k likeliest, then the nucleus of top_p (Holtzman et al., 2020, section 3.1)."""
    if temperature == 0:
        return int(logits.argmax())
    k = min(top_k, len(logits)) or len(logits)
    if k == len(logits) and top_p == 1:
        return int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
    best = logits.topk(k)  # in descending order; a sort of all is a tenth of the time of a token of GPT-2
    p = (best.values / temperature).softmax(dim=-1)
    # The likeliest tokens until top_p is reached: those before which less than top_p of what top_k left is held.
    p[p.cumsum(dim=-1) - p >= top_p] = 0
    return int(best.indices[torch.multinomial(p, 1, generator=generator)])


# ---------------------------------------------------------------------------------------------------------------------
# Fill in

EXAMPLES = {"encoder": "The [MASK] sat on the mat.", "encoder-decoder": "The <extra_id_0> sat on the mat."}
"""By architecture, a prompt that a model fills in."""


@torch.inference_mode()
def fill_masks(model: Transformer, tokenizer: Tokenizer, text: str, k: int = 5) -> list[list[tuple[str, float]]]:
    """For each [MASK] of the text the k likeliest tokens with their probabilities, by an encoder that sees
    [CLS] text [SEP]. Raises UserError for a text without one, or too long."""
    tokens = [tokenizer.cls, *encode_masked(tokenizer, text), tokenizer.sep]
    check_length(tokens, model)
    inputs = torch.tensor([tokens], device=next(model.parameters()).device)
    logits = model.eval()(inputs)[0, inputs[0] == tokenizer.mask, : tokenizer.n_vocab]  # (masks, V)
    best = logits.float().softmax(dim=-1).topk(min(k, tokenizer.n_vocab))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(tokenizer.decode([i]), p) for i, p in zip(*row, strict=True)] for row in rows]


def fill_sentinels(
    model: Transformer, tokenizer: Tokenizer, text: str, mode: tuple[int, ...] = (), **options
) -> dict[str, str]:
    """What a model writes for each <extra_id_...> of the text, "" where it writes nothing: it reads the tokens of `mode`, the
    text and the end of text (Raffel et al., 2020, section 3.1.4). `options` are those of `generate`. Raises UserError for
    a text without a sentinel, or too long."""
    sentinels = {f"<extra_id_{i}>": int(token) for i, token in enumerate(tokenizer.sentinels)}
    text_tokens = encode_with(tokenizer, text, sentinels)
    wanted = [name for name, token in sentinels.items() if token in text_tokens]
    if not wanted:
        raise UserError(f'the prompt has no <extra_id_0> to fill, as in "{EXAMPLES["encoder-decoder"]}"')
    source = [*mode, *text_tokens, tokenizer.eot]
    check_length(source, model)
    options = {"max_tokens": model.config.seq_len - 1, **options}
    names, written, name = {token: name for name, token in sentinels.items()}, {}, None
    for token in answer(model, tokenizer, source, **options):
        name = names.get(token, name)
        if token not in names and name:
            written.setdefault(name, []).append(token)
    return {name: tokenizer.decode(written.get(name, [])) for name in wanted}


def encode_masked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text with [MASK] in it. Raises UserError for a text without one."""
    tokens = encode_with(tokenizer, text, {"[MASK]": tokenizer.mask})
    if tokenizer.mask not in tokens:
        raise UserError(f'the prompt has no [MASK] to fill, as in "{EXAMPLES["encoder"]}"')
    return tokens


def encode_with(tokenizer: Tokenizer, text: str, special: dict[str, int]) -> list[int]:
    """The ids of a text in which these names of special tokens mean the tokens. Where tokens can be words, a space before
    a name is left out: it belongs to the word that the name stands for."""
    holds_words = tokenizer.bytes_per_token.max() > 4  # longer than any character
    ids = []
    *parts, last = re.split(f"({'|'.join(map(re.escape, special))})", text)
    for part in parts:
        plain = part.removesuffix(" ") if holds_words else part
        ids += [special[part]] if part in special else tokenizer.encode(plain).tolist()
    return ids + tokenizer.encode(last).tolist()


def check_length(tokens: list[int], model: Transformer) -> None:
    if len(tokens) > model.config.seq_len:
        raise UserError(f"the prompt is {len(tokens)} tokens long; the model reads {model.config.seq_len}.")
