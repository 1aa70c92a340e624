"""What each objective learns in a few hundred steps, against baselines of counting, over three seeds.

    python benchmarks/convergence.py --train books_train.jsonl.xz --val books_val.jsonl.xz
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanopre import config as configs, corpus as corpora  # noqa: E402
from nanopre.command_line import Parser, at_least, run_script  # noqa: E402

# (row, config, overrides, metric of the validation split, what it must be below or above, margin to it)
ROWS = [
    ("MLM, 400 steps", "mlm-books", ["--train.steps=400"], "mlm_loss", "unigram", -0.9),
    ("NSP accuracy, 400 steps", "nsp-books", ["--train.steps=400"], "nsp_accuracy", "above", 0.80),
    ("causal LM, 300 steps", "clm-books", ["--train.steps=300"], "loss", "unigram", -1.4),
    ("causal LM, 800 steps", "clm-books", ["--train.steps=800"], "loss", "bigram", 0.0),
    ("prefix LM, 300 steps", "prefix-lm-books", ["--train.steps=300"], "loss", "unigram", -1.0),
    ("span corruption, text, 400 steps", "span-corruption-books", ["--train.steps=400"], "text_loss", "unigram", -0.15),
    ("NSP accuracy, a random B from any token", "mlm-books",
     ["--train.steps=400", "--objective.name=any_token"], "nsp_accuracy", "above", 0.80),
    ("control: coins for NSP labels", "mlm-books",
     ["--train.steps=400", "--train.batch_size=32", "--objective.name=shuffled_labels"], "nsp_accuracy", "about", 0.5),
    ("control: tokens from anywhere", "clm-books",
     ["--train.steps=300", "--objective.name=shuffled_tokens"], "loss", "not below unigram", 0.0),
]  # fmt: skip


def baselines(train: str, val: str, cache: str) -> dict[str, float]:
    """Nats a token of the validation text under the training text's unigram, and its bigram smoothed by the unigram with
    the weight that suits the validation text best."""
    overrides = [f"--data.corpus={train}", f"--data.val_corpus={val}", f"--data.cache_dir={cache}"]
    config, registry = configs.load(ROOT / "configs" / "clm-books.toml", overrides)
    corpus = corpora.prepare(config, registry)
    V, tokens, held_out = corpus.tokenizer.n_vocab, corpus.train.tokens.astype(np.int64), corpus.val.tokens.astype(np.int64)
    unigram = unigram_of(corpus)
    pairs = np.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V).reshape(V, V)
    a, b = held_out[:-1], held_out[1:]
    smoothed = [
        -np.log((pairs[a, b] + weight * unigram[b]) / (pairs.sum(axis=1)[a] + weight)).mean() for weight in (1, 10, 100, 1000)
    ]
    return {
        "unigram": float(-np.log(unigram[held_out]).mean()),
        "bigram": float(min(smoothed)),
        "nsp_by_counts": nsp_by_counts(overrides),
    }


def unigram_of(corpus: corpora.Corpus) -> np.ndarray:
    """Each token's share of the training text, as if every one had been seen once more."""
    V = corpus.tokenizer.n_vocab
    return (np.bincount(corpus.train.tokens, minlength=V) + 1) / (corpus.train.n_tokens + V)


def nsp_by_counts(overrides: list[str]) -> float:
    """NSP accuracy on validation pairs by the tokens that A and B share: B continues A if its tokens' mean log-likelihood
    under A's counts, smoothed by the unigram, is above the unigram's by enough. Smoothing and threshold are those that suit
    the training pairs best."""
    overrides = [*overrides, "--objective.mask_fraction=0", "--objective.short_fraction=0"]
    config, registry = configs.load(ROOT / "configs" / "nsp-books.toml", overrides)
    corpus, objective, seq_len = corpora.prepare(config, registry), config.objective, config.train.seq_len
    unigram = unigram_of(corpus)

    def pairs(split) -> tuple[np.ndarray, np.ndarray]:
        """(gain of each of the first 4,000 pairs for each weight, is_random)"""
        rows = np.arange(min(4000, objective.rows_per_epoch(split, seq_len)))
        batch = objective.batch(split, rows, seq_len, config.seed)
        gains = []
        for tokens, n, in_b in zip(batch["tokens"], batch["visible"], batch["segments"], strict=True):
            in_b = in_b[: n - 1].astype(bool)
            counts, b = np.bincount(tokens[: n - 1][~in_b], minlength=len(unigram)), tokens[: n - 1][in_b]
            p = [(counts[b] + weight * unigram[b]) / (counts.sum() + weight) for weight in (300, 1000, 3000, 10_000)]
            gains.append(np.log(p / unigram[b]).mean(axis=1) if len(b) else np.zeros(4))
        scored = batch["is_random"] >= 0
        return np.array(gains)[scored], batch["is_random"][scored]

    gains, is_random = pairs(corpus.train)
    thresholds = np.quantile(gains, np.linspace(0, 1, 101), axis=0)  # (101, weights)
    accuracy = ((gains < thresholds[:, None]) == is_random[:, None]).mean(axis=1)
    i, j = np.unravel_index(accuracy.argmax(), accuracy.shape)
    gains, is_random = pairs(corpus.val)
    return float(((gains[:, j] < thresholds[i, j]) == is_random).mean())


def train(config: str, overrides: list[str], seed: int) -> dict[str, float]:
    """The last validation metrics of a run, and its wall time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", ROOT / "configs" / f"{config}.toml", f"--seed={seed}"]
        command += [f"--out_dir={folder}", "--train.samples=0", "--checkpoint.keep_best=false", *overrides]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        seconds = time.perf_counter() - began
        lines = [json.loads(line) for line in next(Path(folder).glob("*/log.jsonl")).read_text().splitlines()]
    last = [line for line in lines if "val_loss" in line][-1]
    return {"seconds": seconds, **{key[4:]: value for key, value in last.items() if key.startswith("val_")}}


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="text to train on, as data.corpus")
    parser.add_argument("--val", required=True, help="text to validate on, as data.val_corpus")
    parser.add_argument("--cache", default="cache", help="where the tokenised text is kept (default: cache)")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--only", default="", help="only the rows whose name has this in it")
    a = parser.parse_args(argv)
    rows = [row for row in ROWS if a.only in row[0]]
    if not rows:
        parser.error(f'--only: no row\'s name has "{a.only}" in it; there are: {"; ".join(row[0] for row in ROWS)}')

    data = [f"--data.corpus={a.train}", f"--data.val_corpus={a.val}", f"--data.cache_dir={a.cache}"]
    data += [f'--plugins=["{ROOT / "benchmarks" / "controls.py"}"]']
    base = baselines(a.train, a.val, a.cache)
    print(f"unigram {base['unigram']:.3f}, bigram {base['bigram']:.3f} nats a token; NSP by counts {base['nsp_by_counts']:.3f}")
    file = ROOT / "benchmarks" / "results" / f"convergence-{datetime.date.today()}.json"
    runs: dict[str, list[dict]] = {}
    for name, config, overrides, metric, bar, margin in rows:
        key = " ".join([config, *overrides])
        if key not in runs:
            runs[key] = [train(config, [*data, *overrides], seed) for seed in range(1, a.seeds + 1)]
        values = [run[metric] for run in runs[key]]
        match bar:
            case "above":
                goal, reached = f"> {margin}", min(values) > margin
            case "about":
                goal, reached = f"= {margin} +- 0.02", all(abs(value - margin) < 0.02 for value in values)
            case "not below unigram":
                goal, reached = f"> {base['unigram'] - 0.01:.3f}", min(values) > base["unigram"] - 0.01
            case _:
                goal, reached = f"< {base[bar] + margin:.3f}", max(values) < base[bar] + margin
        about = {"date": str(datetime.date.today()), "torch": torch.__version__, "python": platform.python_version()}
        results = json.loads(file.read_text())["rows"] if file.exists() else {}
        results[name] = {"metric": metric, "goal": goal, "reached": reached, "values": values,
                         "seconds": [run["seconds"] for run in runs[key]]}  # fmt: skip
        file.write_text(json.dumps({**about, "baselines": base, "rows": results}, indent=1) + "\n")
        mean, spread = statistics.mean(values), max(values) - min(values)
        print(f"{name:40} {mean:.3f} (spread {spread:.3f})  goal {goal}: {'reached' if reached else 'NOT reached'}", flush=True)
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    run_script("convergence.py", main)
