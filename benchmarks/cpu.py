"""nanopre beside nanoGPT and transformers on this machine's CPU: the same work, in turns.

    python benchmarks/cpu.py --nanogpt PATH                 the table, in under 15 minutes
    python benchmarks/cpu.py --nanogpt PATH --only char     one row of it
    python benchmarks/cpu.py --quality --only char          validation losses of ours, in float32 and by the machine's choice

PATH is a checkout of karpathy/nanoGPT; transformers comes with `pip install -e '.[bench]'`. Each row has the same shapes,
tokens a step and optimizer settings for all programs: the peer as it is shipped, the peer tuned by hand (bfloat16 autocast,
torch.compile, fused AdamW; benchmarks/peers/), ours, and ours once more, which shows the noise. Ours is train.py itself. Each
program keeps a process of its own; they do their steps in turns. A ratio is the median over the turns of one program's time
by the other's. Written to benchmarks/results/cpu-DATE.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
sys.path[:0] = [str(ROOT), str(PEERS)]

import torch  # noqa: E402
from nanogpt_worker import model_settings, prepare, train_flags  # noqa: E402
from turns import about, alternate, checkout, ratio, save  # noqa: E402

from nanopre import UserError, config as configs, cost  # noqa: E402
from nanopre.command_line import Parser, at_least, run_script  # noqa: E402


@dataclass
class Row:
    """A row of the table: sizes, and how long its turns are."""

    title: str
    d_model: int
    n_layers: int
    n_heads: int
    vocab_size: int
    seq_len: int
    batch_size: int
    steps: int  # a turn
    goals: tuple[float, float]  # of issue and README: the peer's time by ours, as shipped and tuned
    turns: int = 4
    new_tokens: int = 0  # of a row that decodes


FULL = {
    "char": Row("nanoGPT, character", 128, 4, 4, 384, 64, 12, 60, (2.8, 2.1)),
    "6x384": Row("nanoGPT, 6 x 384", 384, 6, 6, 384, 256, 16, 2, (3.3, 1.4)),
    "124m": Row("nanoGPT, GPT-2 124M, 512 tokens", 768, 12, 12, 50304, 512, 1, 2, (3.9, 1.3), turns=3),
    "bert": Row("transformers BERT, 4 x 256", 256, 4, 4, 8192, 128, 32, 3, (5.0, 2.3)),
    "t5": Row("transformers T5, 4+4 x 256, 256 -> 64", 256, 4, 4, 8192, 256, 16, 3, (3.3, 1.2)),
    "decode": Row("GPT-2 124M, decoding 256 tokens", 768, 12, 12, 50304, 1024, 1, 1, (11.0, 1.4), turns=2, new_tokens=256),
}
TINY = {  # to test this script with: every row, in seconds
    name: Row(row.title, 32, 1, 1, 384, 256 if name == "t5" else 32, 2, 1, row.goals, turns=2, new_tokens=row.new_tokens and 4)
    for name, row in FULL.items()
}
T5_TARGETS = 64  # of 256 tokens, by a noise density of 0.165 (nanopre.spans)


def our_flags(name: str, row: Row) -> list[str]:
    """Flags of train.py for a row. The tokens are bytes of this project's own files: their values change no time."""
    family = {"bert": "bert", "t5": "t5"}.get(name, "gpt2")
    flags = [
        f"--model.name={family}", f"--model.d_model={row.d_model}", f"--model.n_layers={row.n_layers}",
        f"--model.n_heads={row.n_heads}", f"--model.vocab_size={row.vocab_size}", "--tokenizer.name=bytes",
        f"--train.batch_size={row.batch_size}", f"--train.seq_len={row.seq_len}", "--train.device=cpu", "--train.samples=0",
        "--optimizer.lr=1e-3", "--optimizer.weight_decay=0.1", "--checkpoint.interval=0",
    ]  # fmt: skip
    if family == "gpt2":  # GELU by the error function and no biases, as nanoGPT has it
        return [*flags, "--model.activation=gelu", "--model.bias=false"]
    if family == "bert":
        return [*flags, "--objective.name=mlm_nsp"]
    return [*flags, "--model.activation=relu", "--model.tie_embeddings=true", f"--model.d_head={row.d_model // row.n_heads}",
            "--objective.name=span_corruption", "--objective.noise_density=0.165"]  # fmt: skip


def commands(name: str, row: Row, nanogpt: Path | None, folder: Path) -> dict[str, list]:
    """What each program of a row is started by; a program that is not here is left out."""
    flags = our_flags(name, row)
    if row.new_tokens:
        ours = [PEERS / "ours.py", row.new_tokens, *flags]
    else:
        ours = [
            ROOT / "train.py", os.devnull, *flags, f'--plugins=["{PEERS}/ours.py"]', "--loggers.turns={}",
            "--train.steps=1000000", "--data.val_fraction=0", f"--data.corpus={ROOT}/nanopre/*.py",
            f"--out_dir={folder / 'runs'}", f"--data.cache_dir={folder / 'cache'}",
        ]  # fmt: skip
    hf = partial(huggingface_command, name, row)
    if name in ("bert", "t5"):
        return {"shipped": hf([]), "tuned": hf(["tuned"]), "ours": ours, "repeat": ours}
    programs: dict[str, list] = {}
    if nanogpt:
        shipped = [PEERS / "nanogpt_worker.py", prepare(nanogpt, folder / f"{name}-shipped", row.vocab_size, tuned=False)]
        if row.new_tokens:
            programs["shipped"] = [*shipped, "decode", json.dumps(model_settings(row)), row.new_tokens]
        else:
            tuned = [PEERS / "nanogpt_worker.py", prepare(nanogpt, folder / f"{name}-tuned", row.vocab_size, tuned=True)]
            options = ["train", *train_flags(row, "cpu", "--learning_rate=1e-3")]
            programs["shipped"] = [*shipped, *options, "--compile=False"]
            programs["tuned"] = [*tuned, *options, "--compile=True", "--dtype=bfloat16"]
    if row.new_tokens:
        programs["tuned"] = hf([])
    return programs | {"ours": ours, "repeat": ours}


def huggingface_command(name: str, row: Row, options: list[str]) -> list:
    kind, shape = name, {"rows": row.batch_size, "tokens": row.seq_len}
    if name == "bert":
        settings = {"hidden_size": row.d_model, "num_hidden_layers": row.n_layers, "num_attention_heads": row.n_heads}
        settings |= {"intermediate_size": 4 * row.d_model, "max_position_embeddings": row.seq_len}
    elif name == "t5":
        shape["decoder_tokens"] = T5_TARGETS
        settings = {"d_model": row.d_model, "num_layers": row.n_layers, "num_heads": row.n_heads, "d_ff": 4 * row.d_model}
        settings |= {"d_kv": row.d_model // row.n_heads}
    else:
        kind, shape = "gpt2", {"new_tokens": row.new_tokens}
        settings = {"n_embd": row.d_model, "n_layer": row.n_layers, "n_head": row.n_heads, "n_positions": row.seq_len}
    return [PEERS / "huggingface.py", kind, json.dumps(shape), json.dumps({**settings, "vocab_size": row.vocab_size}), *options]


def work(name: str, row: Row) -> tuple[int, float]:
    """(tokens, FLOPs that are needed) of a step; of a decoding row, of its new tokens, two for each weight."""
    config, _ = configs.load(os.devnull, our_flags(name, row))
    with torch.device("meta"):
        settings = config.model.build(vocab_size=row.vocab_size, seq_len=row.seq_len).config
    if row.new_tokens:
        parts = cost.parameters(settings)
        return row.new_tokens, 2 * row.new_tokens * (parts["total"] - settings.seq_len * settings.d_model)
    scored = {"bert": round(0.15 * row.seq_len), "t5": T5_TARGETS}.get(name)
    per_token = cost.flops_per_token(settings, row.seq_len, T5_TARGETS if name == "t5" else 0, scored)
    tokens = row.batch_size * row.seq_len
    return tokens, tokens * per_token


def matmul_rate() -> float:
    """FLOP/s of bfloat16 products of 2,048 x 2,048 matrices, the best of ten: what the MFU is a share of."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = min(_seconds(lambda: a @ b) for _ in range(10))
    return 2 * 2048**3 / best


def _seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(rows: dict[str, Row], nanogpt: Path | None, threads: int) -> dict:
    """Every row, with the rates of products at the start and end of them all; the table is printed as it grows."""
    torch.set_num_threads(threads)
    result: dict = {**about(threads), "matmul_flops": [matmul_rate()], "rows": {}}
    print(f"{result['cpu']}, {threads} threads, load {result['load_at_start']:.1f}, "
          f"bfloat16 products {result['matmul_flops'][0] / 1e9:.0f} GFLOP/s")  # fmt: skip
    header = ("row", "shipped/ours", "goal", "tuned/ours", "goal", "ours/ours", "tokens/s", "MFU", "peak GB", "start s")
    print("{:38} {:>12} {:>5} {:>10} {:>5} {:>9} {:>9} {:>6}  {:>14}  {}".format(*header))
    for name, row in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            programs = alternate(commands(name, row, nanogpt, Path(folder)), row.steps, row.turns, Path(folder), threads)
        result["matmul_flops"].append(matmul_rate())
        tokens, flops = work(name, row)
        for program in programs.values():
            step = median(program["seconds"])
            program |= {"tokens_per_second": tokens / step, "mfu": flops / step / max(result["matmul_flops"])}
        ours = programs["ours"]
        ratios = {key: ratio(programs[key], ours) for key in ("shipped", "tuned", "repeat") if key in programs}
        result["rows"][name] = {"title": row.title, "ratios": ratios, "programs": programs}
        cells = [f"{ratios[key]:.2f}" if key in ratios else "-" for key in ("shipped", "tuned", "repeat")]
        peaks = "/".join(f"{programs[key]['memory'] / 1e9:.2f}" for key in ("shipped", "tuned", "ours") if key in programs)
        starts = "/".join(f"{programs[key]['startup']:.1f}" for key in ("shipped", "tuned", "ours") if key in programs)
        print(f"{row.title:38} {cells[0]:>12} {row.goals[0]:>5} {cells[1]:>10} {row.goals[1]:>5} {cells[2]:>9} "
              f"{ours['tokens_per_second']:>9,.0f} {ours['mfu']:>6.1%}  {peaks:>14}  {starts}", flush=True)  # fmt: skip
    return result


def quality(rows: dict[str, Row], threads: int, steps: int = 500, seeds: int = 3) -> dict:
    """Validation losses of ours after `steps` steps on the standard library's source, {row: {precision: [a loss a seed]}}."""
    losses: dict[str, dict[str, list[float]]] = {}
    for name, row in rows.items():
        if row.new_tokens:
            continue
        losses[name] = {"float32": [], "auto": []}
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(seeds):
                for precision, found in losses[name].items():
                    flags = [*our_flags(name, row), f"--seed={seed}", f"--name={precision}-{seed}", f"--out_dir={folder}/runs"]
                    flags += [f"--data.cache_dir={folder}/cache", f"--train.steps={steps}", f"--train.eval_interval={steps}"]
                    flags += [f"--train.precision={precision}", "--train.eval_tokens=65536", "--checkpoint.keep_best=false"]
                    command = [sys.executable, ROOT / "train.py", os.devnull, *flags]
                    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
                    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
                    log = (Path(folder) / "runs" / f"{precision}-{seed}" / "log.jsonl").read_text().splitlines()
                    found.append([record["val_loss"] for record in map(json.loads, log) if "val_loss" in record][-1])
        difference = mean(losses[name]["auto"]) - mean(losses[name]["float32"])
        print(f"{row.title}: {losses[name]}, difference of the means {difference:+.4f} (at most 0.01 counts)", flush=True)
    return losses


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of karpathy/nanoGPT; without it its rows show ours alone")
    rows = ", ".join(FULL)
    parser.add_argument("--only", action="append", choices=FULL, metavar="ROW", help=f"a row, as often as you like: {rows}")
    parser.add_argument("--shapes", choices=("full", "tiny"), default="full", help="tiny: a test of the script itself")
    parser.add_argument("--threads", type=at_least(1), default=2, help="of each program (default: 2)")
    parser.add_argument("--quality", action="store_true", help="validation losses of ours in place of times")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of the JSON file")
    a = parser.parse_args(argv)
    shapes = FULL if a.shapes == "full" else TINY
    rows = {name: row for name, row in shapes.items() if not a.only or name in a.only}
    if not a.quality and {"bert", "t5", "decode"} & set(rows) and find_spec("transformers") is None:
        raise UserError("transformers, a peer of these rows, is not installed; run: pip install -e '.[bench]'.")
    if a.quality:
        result, name = {**about(a.threads), "val_loss": quality(rows, a.threads)}, "cpu-quality"
    else:
        result, name = measure(rows, a.nanogpt, a.threads), "cpu"
    print(f"written: {save(result, a.out, name, a.shapes)}")


if __name__ == "__main__":
    run_script("cpu.py", main, RuntimeError)
