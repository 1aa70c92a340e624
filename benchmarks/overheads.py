"""What the house costs: start-up, and the dispatch of plugins.

    python benchmarks/overheads.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanopre import config as configs, hookimpl  # noqa: E402
from nanopre.command_line import Parser, run_script  # noqa: E402


class Observer:
    """A plugin that does nothing: what is left is the call."""

    @hookimpl
    def nanopre_step_end(self, run, step, metrics):
        pass


def main(argv: list[str]) -> None:
    Parser(description=__doc__.splitlines()[0]).parse_args(argv)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "train.py", "--print-config"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    print(f"train.py --print-config: {statistics.median(seconds):.2f} s (of 5; {min(seconds):.2f} to {max(seconds):.2f})")

    # As many observers as a run with four loggers has.
    _, registry = configs.load(ROOT / "configs" / "shakespeare-char.toml")
    for i in range(4):
        registry.register_instance(Observer(), f"observer-{i}")
    n = 20_000
    began = time.perf_counter()
    for step in range(n):
        registry.hook.nanopre_step_end(run=None, step=step, metrics={})
    dispatch = (time.perf_counter() - began) / n

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "train.py", ROOT / "configs" / "shakespeare-char.toml", "--data.corpus=stdlib"]
        command += ["--tokenizer.name=bytes", f"--out_dir={folder}", f"--data.cache_dir={folder}/cache"]
        command += ["--train.steps=100", "--train.samples=0", "--train.eval_tokens=64"]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (Path(folder) / "shakespeare-char" / "log.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines if "seconds" in line]
    step = statistics.median(b - a for a, b in zip(times[20:], times[21:], strict=False))
    print(
        f"dispatch to 4 plugins: {dispatch * 1e6:.1f} us, {dispatch / step:.3%} of the {step * 1e3:.1f} ms that a step of "
        "the smallest config (configs/shakespeare-char.toml) takes"
    )


if __name__ == "__main__":
    run_script("overheads.py", main)
