"""nanopre beside nanoGPT on one GPU, and ours at the sizes that matter there.

    python benchmarks/gpu.py --nanogpt PATH                             in under 8 minutes on an H200
    python benchmarks/gpu.py --nanogpt PATH --shapes tiny --device cpu   a test of the script itself

nanoGPT with torch.compile, bfloat16 and its fused AdamW, in turns with ours, which is train.py itself, at GPT-2 124M; then
ours alone at other sizes; then decoding. The MFU is 6 N + 12 L H Q T FLOPs a token (nanopre.cost.flops_per_token) by the data
sheet's peak of dense bfloat16 products (nanopre.cost.PEAK_FLOPS); where the peak is not known it is left out. Peak memory is
that of torch's allocator. Written to benchmarks/results/gpu-DATE.json.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
sys.path[:0] = [str(ROOT), str(PEERS)]

import torch  # noqa: E402
from nanogpt_worker import model_settings, prepare, train_flags  # noqa: E402
from turns import about, alternate, checkout, ratio, save  # noqa: E402

from nanopre import UserError, config as configs, cost  # noqa: E402
from nanopre.command_line import Parser, run_script  # noqa: E402


@dataclass
class Row:
    """A row of the table: sizes, and what else differs."""

    title: str
    family: str  # of our models
    d_model: int
    n_layers: int
    n_heads: int
    seq_len: int
    batch_size: int  # rows of a step, all at once
    vocab_size: int = 50304
    flags: tuple[str, ...] = ()
    peer: bool = False  # whether nanoGPT takes turns
    new_tokens: int = 0  # of a row that decodes
    steps: int = 10  # a turn


GPT2 = ("--model.activation=gelu", "--model.bias=false")  # as nanoGPT has it
FULL = {
    "124m": Row("GPT-2 124M", "gpt2", 768, 12, 12, 1024, 32, flags=GPT2, peer=True),
    "350m": Row("GPT-2 350M", "gpt2", 1024, 24, 16, 1024, 16, flags=GPT2),
    "774m": Row("GPT-2 774M", "gpt2", 1280, 36, 20, 1024, 12, flags=GPT2),
    "1.5b": Row("GPT-2 1.5B", "gpt2", 1600, 48, 25, 1024, 12, flags=GPT2, steps=5),
    "llama-1b": Row("LLaMA 1B, 2,048 tokens", "llama", 2048, 16, 32, 2048, 8, 32000,
                    ("--model.n_kv_heads=8", "--model.d_ff=8192"), steps=5),
    "bert": Row("BERT-base, 512 tokens", "bert", 768, 12, 12, 512, 64, 30592, ("--objective.name=mlm_nsp",)),
    "t5": Row("T5-base, 512 tokens", "t5", 768, 12, 12, 512, 32, 32128, ("--objective.name=span_corruption",)),
    "decode": Row("GPT-2 124M, decoding 256 tokens", "gpt2", 768, 12, 12, 1024, 1, flags=GPT2, peer=True, new_tokens=256,
                  steps=1),
}  # fmt: skip
SIZES = ("--model.d_ff", "--model.n_kv_heads")
TINY = {
    name: Row(row.title, row.family, 32, 1, 2, 32, 2, 384, tuple(f for f in row.flags if not f.startswith(SIZES)), row.peer,
              row.new_tokens and 4, steps=1)
    for name, row in FULL.items()
}  # fmt: skip


def our_flags(row: Row, device: str) -> list[str]:
    return [
        f"--model.name={row.family}", f"--model.d_model={row.d_model}", f"--model.n_layers={row.n_layers}",
        f"--model.n_heads={row.n_heads}", f"--model.vocab_size={row.vocab_size}", "--tokenizer.name=bytes", *row.flags,
        f"--train.batch_size={row.batch_size}", f"--train.seq_len={row.seq_len}", f"--train.device={device}",
        "--train.samples=0", "--optimizer.lr=6e-4", "--checkpoint.interval=0",
    ]  # fmt: skip


def commands(name: str, row: Row, nanogpt: Path | None, device: str, compiled: bool, folder: Path) -> dict[str, list]:
    flags, programs = our_flags(row, device), {}
    if nanogpt and row.peer:
        worker = [PEERS / "nanogpt_worker.py", prepare(nanogpt, folder / name, row.vocab_size, tuned=True)]
        if row.new_tokens:
            programs["nanogpt"] = [*worker, "decode", json.dumps(model_settings(row)), row.new_tokens]
        else:
            flags_of_peer = train_flags(row, device, "--dtype=bfloat16", f"--compile={compiled}", "--learning_rate=6e-4")
            programs["nanogpt"] = [*worker, "train", *flags_of_peer]
    if row.new_tokens:
        settings = {"n_embd": row.d_model, "n_layer": row.n_layers, "n_head": row.n_heads, "n_positions": row.seq_len}
        settings = json.dumps({**settings, "vocab_size": row.vocab_size})
        programs["transformers"] = [PEERS / "huggingface.py", "gpt2", json.dumps({"new_tokens": row.new_tokens}), settings]
        return programs | {"ours": [PEERS / "ours.py", row.new_tokens, *flags]}
    return programs | {"ours": [
        ROOT / "train.py", os.devnull, *flags, f'--plugins=["{PEERS}/ours.py"]', "--loggers.turns={}", "--train.steps=1000000",
        f"--train.compile={'on' if compiled else 'off'}", "--data.val_fraction=0", f"--data.corpus={ROOT}/nanopre/*.py",
        f"--out_dir={folder / 'runs'}", f"--data.cache_dir={folder / 'cache'}",
    ]}  # fmt: skip


def flops_of_step(row: Row, device: str) -> float:
    """That a step needs, by the formula."""
    config, _ = configs.load(os.devnull, our_flags(row, device))
    with torch.device("meta"):
        settings = config.model.build(vocab_size=row.vocab_size, seq_len=row.seq_len).config
    decoder, scored = (114, None) if row.family == "t5" else (0, round(0.15 * row.seq_len) if row.family == "bert" else None)
    return row.batch_size * row.seq_len * cost.flops_per_token(settings, row.seq_len, decoder, scored)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of karpathy/nanoGPT; without it ours alone is measured")
    rows = ", ".join(FULL)
    parser.add_argument("--only", action="append", choices=FULL, metavar="ROW", help=f"a row, as often as you like: {rows}")
    parser.add_argument("--shapes", choices=("full", "tiny"), default="full", help="tiny: a test of the script itself")
    parser.add_argument("--device", default="cuda", help="of all programs (default: cuda)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of the JSON file")
    a = parser.parse_args(argv)
    if a.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda: no GPU here; --shapes tiny --device cpu tests the script.")
    threads, compiled, shapes = torch.get_num_threads(), a.device == "cuda", FULL if a.shapes == "full" else TINY
    peak = cost.peak_flops(torch.device(a.device), torch.bfloat16)
    name = torch.cuda.get_device_name() if a.device == "cuda" else "cpu"
    result: dict = {**about(threads), "device": name, "peak_flops": peak, "rows": {}}
    print(f"{name}, peak {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'not known'}")
    print(f"{'row':34} {'program':13} {'tokens/s':>10} {'MFU':>6} {'peak GB':>8} {'start s':>8}  by ours")
    for key, row in shapes.items():
        if a.only and key not in a.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            started = commands(key, row, a.nanogpt, a.device, compiled, Path(folder))
            programs = alternate(started, row.steps, 3, Path(folder), threads)
        for program, found in programs.items():
            step = median(found["seconds"])
            found["tokens_per_second"] = (row.new_tokens or row.batch_size * row.seq_len) / step
            found["mfu"] = flops_of_step(row, a.device) / step / peak if peak and not row.new_tokens else None
            found["time_by_ours"] = ratio(found, programs["ours"])
            mfu = f"{found['mfu']:.1%}" if found["mfu"] else "-"
            print(f"{row.title:34} {program:13} {found['tokens_per_second']:>10,.0f} {mfu:>6} {found['memory'] / 1e9:>8.2f} "
                  f"{found['startup']:>8.1f}  {found['time_by_ours']:.2f}", flush=True)  # fmt: skip
        result["rows"][key] = {"title": row.title, "programs": programs}
    print(f"written: {save(result, a.out, 'gpu', a.shapes)}")


if __name__ == "__main__":
    run_script("gpu.py", main, RuntimeError)
