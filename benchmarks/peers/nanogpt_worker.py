"""nanoGPT as a worker: its own train.py, which waits for its turn where it prints a step; or its own `generate`.

    python nanogpt_worker.py FOLDER train FLAGS OF ITS TRAIN.PY
    python nanogpt_worker.py FOLDER decode MODEL TOKENS         MODEL: a GPTConfig as JSON

FOLDER is what `prepare` has made of a checkout.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

TUNED = (  # by hand, beside --compile=True: (file, what nanoGPT has there, what stands there instead)
    ("train.py", "ctx = nullcontext() if device_type == 'cpu' else ", "ctx = "),  # bfloat16 on a CPU, too
    ("model.py", "use_fused = fused_available and device_type == 'cuda'", "use_fused = fused_available"),  # AdamW
)


def prepare(checkout: Path, folder: Path, vocab_size: int, tuned: bool) -> Path:
    """A copy of the checkout with random tokens of a vocabulary of this size as its data set `random`."""
    import numpy as np

    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "out*"))
    data = folder / "data" / "random"
    data.mkdir()
    tokens = np.random.default_rng(0).integers(vocab_size, size=1_000_000, dtype=np.uint16)
    tokens.tofile(data / "train.bin")
    tokens[:100_000].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    for name, before, after in TUNED if tuned else ():
        source = (folder / name).read_text()
        if before not in source:
            raise RuntimeError(f"{checkout / name} has no {before!r}, which tuning replaces: take nanoGPT's master.")
        (folder / name).write_text(source.replace(before, after))
    return folder


def train_flags(row, device: str, *others: str) -> list[str]:
    """Of its train.py, for a row of a benchmark's table. It evaluates once, at its start, as its loop is written."""
    return [
        "--dataset=random", f"--device={device}", "--eval_iters=1", "--eval_interval=1000000", "--log_interval=1",
        f"--block_size={row.seq_len}", f"--batch_size={row.batch_size}", f"--n_layer={row.n_layers}", f"--n_head={row.n_heads}",
        f"--n_embd={row.d_model}", "--dropout=0.0", "--gradient_accumulation_steps=1", *others,
    ]  # fmt: skip


def model_settings(row) -> dict:
    """Its GPTConfig, for a row."""
    return {
        "n_layer": row.n_layers, "n_head": row.n_heads, "n_embd": row.d_model, "block_size": row.seq_len,
        "vocab_size": row.vocab_size, "bias": False, "dropout": 0.0,
    }  # fmt: skip


def train(flags: list[str]) -> None:
    from turns import Turns

    turns = Turns()

    def spy(text: str) -> None:
        print(text)
        if text.startswith("iter "):  # after each step, with --log_interval=1
            turns.tick()

    sys.argv = ["train.py", *flags]
    exec(compile(Path("train.py").read_text(), "train.py", "exec"), {"__name__": "__main__", "print": spy})


def decode(settings: dict, n_tokens: int) -> None:
    """As its sample.py does, which has no bfloat16 on a CPU."""
    import torch
    from model import GPT, GPTConfig
    from turns import Turns

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, turns = GPT(GPTConfig(**settings)).to(device).eval(), Turns()
    prompt = torch.arange(16, device=device)[None]
    while True:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model.generate(prompt, n_tokens, temperature=0.8, top_k=200)
        turns.tick()


if __name__ == "__main__":
    folder, what, *rest = sys.argv[1:]
    os.chdir(folder)
    sys.path.insert(0, folder)
    train(rest) if what == "train" else decode(json.loads(rest[0]), int(rest[1]))
