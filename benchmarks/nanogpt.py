"""Time to quality beside nanoGPT: both programs as a user runs them, on tinyshakespeare, character by character, on a CPU.

    python benchmarks/nanogpt.py --nanogpt PATH --text tinyshakespeare.txt

PATH is a checkout of karpathy/nanoGPT. Measured, and written to benchmarks/results/nanogpt-DATE.json: wall time from start to
exit, and the validation loss of the last weights over the whole validation split in the same windows of 64 characters, of
nanoGPT's 2,000 steps, of the same set-up of ours, and of our own recipe, configs/shakespeare-char-fast.toml. Step times are
benchmarks/cpu.py's.
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from turns import about, checkout

from nanopre.command_line import Parser, run_script

ROOT = Path(__file__).parents[1]
# The command of nanoGPT's README for a CPU ("I only have a macbook"), without its weights-only shortcuts.
NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters=2000 --dropout=0.0"
).split()


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=checkout, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare's input.txt")
    a = parser.parse_args(argv)

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

    def theirs(*options: str) -> float:
        """Run nanoGPT's train.py; wall time in seconds."""
        began = time.perf_counter()
        subprocess.run([sys.executable, *NANOGPT, *options], cwd=peer, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    ours("shakespeare-char", "--train.steps=1", "--train.eval_tokens=64")  # tokenises the corpus and warms the disk's cache
    result = {}
    seconds = theirs("--max_iters=2000", "--eval_interval=250", "--always_save_checkpoint=True")
    peer_loss = evaluate_nanogpt(peer, vocabulary)
    result["nanogpt"] = {"val_loss": peer_loss, "wall_seconds": seconds}
    print(f"nanoGPT: validation loss {peer_loss:.4f}, {seconds:.0f} s")
    for config in ("shakespeare-char", "shakespeare-char-fast"):
        folder, seconds = ours(config)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        val_loss = [line["val_loss"] for line in lines if "val_loss" in line][-1]
        train_seconds = [line["seconds"] for line in lines if "seconds" in line][-1]
        result[config] = {"val_loss": val_loss, "wall_seconds": seconds, "train_seconds": train_seconds}
        share = seconds / result["nanogpt"]["wall_seconds"]
        print(f"{config}: validation loss {val_loss:.4f}, {seconds:.0f} s, {share:.2f} of nanoGPT's")
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


def write(result: dict) -> None:
    result = {**about(torch.get_num_threads()), **result}
    path = ROOT / "benchmarks" / "results" / f"nanogpt-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run_script("nanogpt.py", main)
