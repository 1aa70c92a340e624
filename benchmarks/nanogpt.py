"""nanopre beside nanoGPT on tinyshakespeare, character by character, on this machine's CPU.

    python benchmarks/nanogpt.py --nanogpt PATH --text tinyshakespeare.txt

PATH is a checkout of karpathy/nanoGPT. Measured, and written to benchmarks/results/nanogpt-DATE.json:

- step time: both programs as a user runs them, one after the other in turns (A B A B ...), 200 steps each; the median step
  of each turn, then the ratio of each pair; the median of the ratios counts. An A/A pair of ours shows the noise.
- validation loss after the README's 2,000 steps, of both programs' last weights over the whole validation split in the same
  windows of 64 characters.
- time to quality: the training time of configs/shakespeare-char-fast.toml, and its validation loss.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
# The command of nanoGPT's README for a CPU ("I only have a macbook"), without its weights-only shortcuts.
NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters=2000 --dropout=0.0"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare's input.txt")
    parser.add_argument("--pairs", type=int, default=5, help="turns of the step-time comparison (default: 5)")
    parser.add_argument("--skip-quality", action="store_true", help="step times only")
    a = parser.parse_args()

    work = Path(tempfile.mkdtemp(prefix="nanopre-benchmark-"))
    peer = work / "nanoGPT"
    shutil.copytree(a.nanogpt, peer, ignore=shutil.ignore_patterns(".git"))
    vocabulary = prepare(peer, a.text.read_text(encoding="utf-8"))

    def ours(config: str, *options: str) -> tuple[Path, float]:
        """Run train.py; (the run's folder, wall time from start to end in seconds)."""
        began = time.perf_counter()
        name = f"{config}-{time.time_ns()}"
        command = [sys.executable, ROOT / "train.py", ROOT / f"configs/{config}.toml", f"--name={name}", *options]
        command += [f"--out_dir={work / 'runs'}", f"--data.cache_dir={work / 'cache'}", f"--data.corpus.path={a.text}"]
        command += ["--train.samples=0", "--train.device=cpu"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return work / "runs" / name, time.perf_counter() - began

    def theirs(*options: str) -> tuple[str, float]:
        """Run nanoGPT's train.py; (what it printed, wall time)."""
        began = time.perf_counter()
        command = [sys.executable, *NANOGPT, *options]
        result = subprocess.run(command, cwd=peer, check=True, capture_output=True, text=True)
        return result.stdout, time.perf_counter() - began

    def our_step() -> float:
        folder, _ = ours("shakespeare-char", "--train.steps=200", "--train.eval_interval=1000")
        seconds = [line["seconds"] for line in steps(folder)]
        return statistics.median(b - a for a, b in zip(seconds[20:], seconds[21:], strict=False)) * 1e3

    def their_step() -> float:
        output, _ = theirs("--max_iters=200", "--eval_interval=1000")
        return statistics.median([float(ms) for ms in re.findall(r"iter \d+: .*time ([\d.]+)ms", output)][20:])

    our_step()  # tokenises the corpus and warms the disk's cache
    pairs = []
    for i in range(a.pairs):
        pairs.append((their_step(), our_step()))
        print(f"pair {i + 1}: nanoGPT {pairs[-1][0]:.1f} ms, ours {pairs[-1][1]:.1f} ms, {pairs[-1][0] / pairs[-1][1]:.2f}x")
    repeat = our_step() / our_step()
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    result = {
        "step_ms": {"nanogpt": [p[0] for p in pairs], "ours": [p[1] for p in pairs], "ratio": ratio, "a_a_repeat": repeat}
    }
    print(f"step time: nanoGPT / ours = {ratio:.2f} (median of {a.pairs} pairs; ours / ours = {repeat:.2f})")

    if not a.skip_quality:
        _, seconds = theirs("--max_iters=2000", "--eval_interval=250", "--always_save_checkpoint=True")
        peer_loss = evaluate_nanogpt(peer, vocabulary)
        result["nanogpt"] = {"val_loss": peer_loss, "wall_seconds": seconds}
        print(f"nanoGPT: validation loss {peer_loss:.4f}, {seconds:.0f} s")
        for config in ("shakespeare-char", "shakespeare-char-fast"):
            folder, seconds = ours(config)
            val_loss = [line["val_loss"] for line in lines(folder) if "val_loss" in line][-1]
            result[config] = {"val_loss": val_loss, "wall_seconds": seconds, "train_seconds": steps(folder)[-1]["seconds"]}
            print(f"{config}: validation loss {val_loss:.4f}, {seconds:.0f} s")
    write(result)
    shutil.rmtree(work)


def prepare(peer: Path, text: str) -> list[str]:
    """What nanoGPT's data/shakespeare_char/prepare.py makes of a text that is already here. Returns the vocabulary."""
    folder = peer / "data" / "shakespeare_char"
    characters = sorted(set(text))
    ids = {c: i for i, c in enumerate(characters)}
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        np.array([ids[c] for c in part], dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return characters


def evaluate_nanogpt(peer: Path, vocabulary: list[str]) -> float:
    """Mean loss of its last checkpoint over the whole validation split, in windows of 64 as our evaluation has them."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", peer / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    saved = torch.load(peer / "out-shakespeare-char" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    tokens = torch.from_numpy(np.fromfile(peer / "data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 64):
            window = tokens[start : start + 65]
            total += model(window[None, :-1], window[None, 1:])[1].item() * (len(window) - 1)
    return total / (len(tokens) - 1)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return [line for line in lines(folder) if "seconds" in line]


def write(result: dict) -> None:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else None
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **result,
    }
    path = ROOT / "benchmarks" / "results" / f"nanogpt-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
