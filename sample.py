"""Ask a trained model for what it is for.

    python sample.py runs/NAME --prompt "def " --tokens 200 --temperature 0.8 --top-k 50 --top-p 0.95 --seed 1
    echo "def " | python sample.py runs/NAME --prompt -

A decoder continues the text, an encoder fills in "The [MASK] sat.", an encoder-decoder "The <extra_id_0> sat."; a model
whose objective has a `sample` does what that says: ELECTRA's finds replaced tokens, a fine-tuned one labels or answers.
"""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Iterator

import torch

from nanopre import UserError, checkpoint, machine
from nanopre.command_line import Parser, at_least, run_script
from nanopre.generate import fill_masks, fill_sentinels, generate


def main(argv: list[str]) -> None:
    parser = Parser(description="Ask a trained model for what it is for.")
    parser.add_argument("run", help="a run's folder (its latest checkpoint) or one checkpoint's")
    parser.add_argument("--prompt", default="", help='the text; "-" reads it from stdin (default: a new document)')
    parser.add_argument("--tokens", type=at_least(1), default=200, help="most tokens to make (default: 200)")
    parser.add_argument("--temperature", type=at_least(0.0), default=0.8, help="0: greedy (default: 0.8)")
    parser.add_argument("--top-k", type=at_least(0), default=0, help="only the k likeliest (default: all)")
    parser.add_argument("--top-p", type=probability, default=1.0, help="only the nucleus of this probability (default: 1)")
    parser.add_argument("--seed", type=seed, default=1, help="of the draws; sample i uses seed + i (default: 1)")
    parser.add_argument("--num-samples", type=at_least(1), default=1, help="how many, one after the other (default: 1)")
    parser.add_argument("--json", action="store_true", help="print each result as a line of JSON")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    a = parser.parse_args(argv)

    run = checkpoint.open_run(a.run)
    device = machine.choose_device(a.device, "--device")
    run.model.to(device)
    if run.model.config.architecture != "encoder":
        machine.lighten(run.model, run.config.train)
    try:
        prompt = sys.stdin.read() if a.prompt == "-" else a.prompt
        prompt.encode()
    except UnicodeError:
        raise UserError("--prompt: not UTF-8.") from None
    sys.stdout.reconfigure(errors="replace")  # a terminal that can't show a character shows a question mark
    for i in range(a.num_samples):
        options = {
            "max_tokens": a.tokens,
            "temperature": a.temperature,
            "top_k": a.top_k,
            "top_p": a.top_p,
            "generator": torch.Generator(device).manual_seed(a.seed + i),
        }
        result = ask(run, prompt, options)
        if a.json:
            escaped = not sys.stdout.encoding.lower().startswith("utf")  # where the output can't hold every character
            print(json.dumps({"prompt": prompt, **result, "text": "".join(result["text"])}, ensure_ascii=escaped))
            continue
        if a.num_samples > 1:
            print(f"--- sample {i + 1} ---")
        for piece in result["text"]:
            print(piece, end="", flush=True)
        print()


def ask(run: checkpoint.OpenedRun, prompt: str, options: dict) -> dict:
    """What the model makes of the prompt: "text", or an iterator of its pieces, and what else a program may want to know.
    options: those of `generate`."""
    model, tokenizer = run.model, run.tokenizer
    if hasattr(run.config.objective, "sample"):
        return run.config.objective.sample(run, prompt, options)
    if model.config.architecture == "encoder":
        masks = fill_masks(model, tokenizer, prompt.rstrip("\n"), options["top_k"] or 5)
        lines = [f"[MASK] {i}  {p:7.1%}  {token}" for i, best in enumerate(masks, 1) for token, p in best]
        return {"masks": [[{"token": t, "probability": p} for t, p in best] for best in masks], "text": "\n".join(lines)}
    if model.config.architecture == "encoder-decoder":
        spans = fill_sentinels(model, tokenizer, prompt.rstrip("\n"), **options)
        return {"spans": spans, "text": "\n".join(f"{name} {span}" for name, span in spans.items())}
    return {"text": continue_text(model, tokenizer, prompt, options)}


def continue_text(model, tokenizer, prompt: str, options: dict) -> Iterator[str]:
    """The prompt and what follows it, piece by piece."""
    start = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.eot]
    # A character's bytes may be spread over tokens: the decoder holds them back until the character is whole.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    yield prompt
    for token in generate(model, start, **options, n_vocab=tokenizer.n_vocab, stop=tokenizer.eot):
        yield decoder.decode(tokenizer.token_bytes([token]))
    yield decoder.decode(b"", final=True)


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 2**63")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


if __name__ == "__main__":
    run_script("sample.py", main)
