"""Continue text with a trained model.

    python sample.py runs/NAME --prompt "def " --tokens 200 --temperature 0.8 --top-k 50 --top-p 0.95 --seed 1
    echo "def " | python sample.py runs/NAME --prompt -
"""

from __future__ import annotations

import argparse
import codecs
import sys

import torch

from nanopre import UserError, checkpoint, machine
from nanopre.generate import generate


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Continue text with a trained model.", allow_abbrev=False)
    parser.add_argument("run", help="a run's folder (its latest checkpoint) or one checkpoint's")
    parser.add_argument("--prompt", default="", help='text to continue; "-" reads it from stdin (default: a new document)')
    parser.add_argument("--tokens", type=positive(int), default=200, help="most tokens to make (default: 200)")
    parser.add_argument("--temperature", type=positive(float, zero=True), default=0.8, help="0: greedy (default: 0.8)")
    parser.add_argument("--top-k", type=positive(int, zero=True), default=0, help="only the k likeliest; 0: all (default)")
    parser.add_argument("--top-p", type=probability, default=1.0, help="only the nucleus of this probability (default: 1)")
    parser.add_argument("--seed", type=int, default=1, help="of the draws; sample i uses seed + i (default: 1)")
    parser.add_argument("--num-samples", type=positive(int), default=1, help="how many, one after the other (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    a = parser.parse_args(argv)

    run = checkpoint.open_run(a.run)
    device = machine.choose_device(a.device)
    model, tokenizer = run.model.to(device), run.tokenizer
    prompt = sys.stdin.read() if a.prompt == "-" else a.prompt
    start = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.eot]
    for i in range(a.num_samples):
        if a.num_samples > 1:
            print(f"--- sample {i + 1} ---")
        generator = torch.Generator(device).manual_seed(a.seed + i)
        tokens = generate(
            model,
            start,
            a.tokens,
            a.temperature,
            a.top_k,
            a.top_p,
            generator,
            n_vocab=tokenizer.n_vocab,
            stop=tokenizer.eot,
        )
        # A character's bytes may be spread over tokens: the decoder holds them back until the character is whole.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(prompt, end="", flush=True)
        for token in tokens:
            print(decoder.decode(tokenizer.token_bytes([token])), end="", flush=True)
        print(decoder.decode(b"", final=True))


def positive(kind: type, zero: bool = False):
    """An argparse type: a number above 0, or from 0 on."""

    def parse(text: str):
        value = kind(text)
        if not (value > 0 or zero and value == 0):
            raise argparse.ArgumentTypeError(f"{text} is not {'0 or more' if zero else 'above 0'}")
        return value

    parse.__name__ = kind.__name__
    return parse


def probability(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.stderr.close()
        sys.exit(130)
