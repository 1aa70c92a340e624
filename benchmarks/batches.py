"""How fast objectives make batches: tokens of input per second of processor time, on made-up documents.

    python benchmarks/batches.py mlm_nsp span_corruption --lengths 128 512
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from nanopre.command_line import Parser, at_least, run_script  # noqa: E402
from nanopre.config import build_plugin  # noqa: E402
from nanopre.data import Split  # noqa: E402
from nanopre.machine import keep_freed_memory  # noqa: E402
from nanopre.plugins import load_plugins  # noqa: E402
from nanopre.tokenizer import bytes_tokenizer  # noqa: E402


def make_split(n_tokens: int) -> Split:
    """Documents of about 2,000 tokens in sentences of about 25, each length exponential."""
    tokenizer, draw = bytes_tokenizer(), np.random.default_rng(0)
    documents = np.unique(np.concatenate(([0], draw.exponential(2_000, n_tokens // 2_000).cumsum().astype(int), [n_tokens])))
    documents = documents[documents <= n_tokens]
    sentences = np.union1d(documents, draw.integers(0, n_tokens, n_tokens // 25))
    tokens = draw.integers(0, 256, n_tokens).astype(np.uint16)
    tokens[documents[1:] - 1] = tokenizer.eot
    return Split(tokens, documents, sentences, n_tokens, tokenizer)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("objectives", nargs="*", default=["mlm_nsp"])
    parser.add_argument("--lengths", nargs="+", type=at_least(1), default=[128, 512], help="seq_len of each measurement")
    parser.add_argument("--rows", type=at_least(1), default=256)
    arguments = parser.parse_args(argv)
    keep_freed_memory()  # as train.py does: large arrays would pay for fresh pages each time
    split, registry = make_split(4_000_000), load_plugins([])
    for name in arguments.objectives:
        objective = build_plugin(registry, "objective", {"name": name}, "objective")
        for seq_len in arguments.lengths:
            seconds = []
            for i in range(200):
                rows = np.arange(i * arguments.rows, (i + 1) * arguments.rows)
                began = time.process_time()
                batch = objective.batch(split, rows, seq_len, seed=1)
                seconds.append(time.process_time() - began)
            rate = batch["tokens"].size / statistics.median(seconds) / 1e6
            print(f"{name}, seq_len {seq_len}: {rate:.0f} M tokens a second ({arguments.rows} rows, median of 200 batches)")


if __name__ == "__main__":
    run_script("batches.py", main)
