"""What the tests of whole runs share: a small corpus, a tiny config, and ways to run the scripts as a user does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # real text and models, which no clone brings along: what needs them is skipped
sys.path.insert(0, str(ROOT))  # train.py and sample.py are scripts at the top, not modules of the package

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: tests run side by side, each with a thread

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Twelve documents of made-up sentences: about 40 KB of text with something to learn in it."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    words = ["the", "cat", "dog", "bird", "sees", "likes", "and", "a", "small", "big", "house", "tree"]
    for i in range(12):
        sentences = [" ".join(draw.choices(words, k=draw.randint(4, 9))).capitalize() + "." for _ in range(100)]
        (folder / f"{i}.txt").write_text(" ".join(sentences), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(text_folder, cache_folder, tmp_path) -> list[str]:
    """Arguments of train.py for a run of a second: a tiny model on the made-up text."""
    config = tmp_path / "tiny.toml"
    config.write_text(
        f"""
        name = "tiny"
        out_dir = "{tmp_path}/runs"
        model = {{ name = "llama", d_model = 32, n_layers = 2, n_heads = 2, n_kv_heads = 1, d_ff = 48 }}
        data = {{ corpus = "{text_folder}/*.txt", val_fraction = 0.2, cache_dir = "{cache_folder}" }}
        tokenizer = {{ name = "bytes" }}
        optimizer = {{ name = "adamw", lr = 3e-3 }}
        schedule = {{ name = "cosine", warmup_steps = 2 }}
        [train]
        steps = 12
        batch_size = 8
        seq_len = 48
        eval_interval = 6
        precision = "float32"
        device = "cpu"
        compile = "off"
        samples = 0
        """,
        encoding="utf-8",
    )
    return [str(config)]


def run_script(*arguments, processes: int = 0, timeout: int = 300, **options) -> subprocess.CompletedProcess:
    """`python train.py ...`, or with processes `torchrun --nproc-per-node=N train.py ...`, from the project's folder."""
    launch = [sys.executable]
    if processes:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = {"env": ENVIRONMENT, "cwd": ROOT, "text": True, "capture_output": True, **options}
    return subprocess.run([*launch, *map(str, arguments)], timeout=timeout, check=False, **options)


def read_log(run_dir: Path) -> tuple[list[dict], list[dict]]:
    """(steps, evaluations) of a run's log.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


@pytest.fixture(scope="session")
def ranks():
    """A pool of processes for runs with several ranks."""
    from ranks import Ranks

    pool = Ranks()
    yield pool
    pool.close()
