"""transformers as a worker: a plain training loop on random tokens, or `generate` with its cache in bfloat16.

    python huggingface.py bert|t5|gpt2 SHAPE SETTINGS [tuned]

SHAPE: {"rows", "tokens", "decoder_tokens"} or {"new_tokens"} as JSON; SETTINGS: of the model's config class, as JSON.
`tuned`: bfloat16 by autocast, torch.compile and the fused AdamW. Dropout is 0 in every model, as it is in ours.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import BertConfig, BertForPreTraining, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from turns import Turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bert_batch(rows: int, tokens: int, vocab_size: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocab_size, (rows, tokens))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.randint(2, ids.shape),
        "labels": ids.where(torch.rand(ids.shape) < 0.15, -100),
        "next_sentence_label": torch.randint(2, (rows,)),
    }


def t5_batch(rows: int, tokens: int, vocab_size: int, decoder_tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocab_size, (rows, tokens))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(vocab_size, (rows, decoder_tokens)),
    }


def train(model: torch.nn.Module, make_batch, tuned: bool) -> None:
    model = model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), fused=tuned or None)
    run, turns = torch.compile(model) if tuned else model, Turns()
    while True:
        batch = {name: tensor.to(DEVICE) for name, tensor in make_batch().items()}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=tuned):
            loss = run(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        turns.tick()


def decode(model: torch.nn.Module, n_tokens: int) -> None:
    model, turns = model.to(DEVICE, torch.bfloat16).eval(), Turns()
    prompt = torch.arange(16, device=DEVICE)[None]
    options = {"max_new_tokens": n_tokens, "min_new_tokens": n_tokens, "temperature": 0.8, "top_k": 200, "do_sample": True}
    while True:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, pad_token_id=0, **options)
        turns.tick()


def main(name: str, shape: dict, settings: dict, tuned: bool) -> None:
    if name == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return decode(GPT2LMHeadModel(GPT2Config(**settings, **dropout)), shape["new_tokens"])
    if name == "bert":
        config = BertConfig(**settings, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model, make_batch = BertForPreTraining(config), bert_batch
    else:
        config = T5Config(**settings, dropout_rate=0.0, decoder_start_token_id=0)
        model, make_batch = T5ForConditionalGeneration(config), t5_batch
    return train(model, lambda: make_batch(**shape, vocab_size=settings["vocab_size"]), tuned)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:] == ["tuned"])
