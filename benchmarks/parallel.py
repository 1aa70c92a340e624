"""What splitting a run over processes costs: two processes of one thread beside one process of two threads.

    python benchmarks/parallel.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

# About 10M parameters, 4,096 tokens a step; every step does the same products in every layout.
RUN = [
    "--model.name=gpt2", "--model.n_layers=6", "--model.d_model=384", "--model.n_heads=6", "--tokenizer.name=bytes",
    "--train.batch_size=16", "--train.seq_len=256", "--train.samples=0", "--train.device=cpu", "--data.val_fraction=0",
    "--checkpoint.interval=0", f"--data.corpus={ROOT}/nanopre/*.py",
]  # fmt: skip
LAYOUTS = {  # (processes, threads of each, flags)
    "1 process, 2 threads": (1, 2, []),
    "1 process, 1 thread, 8 micro-batches": (1, 1, ["--train.micro_batch_size=2"]),
    "ddp 2": (2, 1, ["--parallel.ddp={}"]),
    "fsdp 2": (2, 1, ["--parallel.fsdp={}"]),
    "tensor 2": (2, 1, ["--parallel.tensor.degree=2"]),
    "1f1b 2, 8 micro-batches": (2, 1, ["--parallel.pipeline.microbatches=8"]),
}


def step_time(layout: str, steps: int, cache: Path, out: Path) -> float:
    """The median step of a run in seconds, without its first steps."""
    processes, threads, flags = LAYOUTS[layout]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        command = [*launch, ROOT / "train.py", *RUN, *flags, f"--train.steps={steps}", f"--out_dir={folder}"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [*map(str, command), f"--data.cache_dir={cache}"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment
        )
        lines = [json.loads(line) for line in next(Path(folder).glob("*/log.jsonl")).read_text().splitlines()]
    return 4096 / statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="of each run (default: 8)")
    parser.add_argument("--turns", type=int, default=3, help="in each of which every layout runs once (default: 3)")
    a = parser.parse_args()
    times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(a.turns):
            for layout in LAYOUTS:
                times[layout].append(step_time(layout, a.steps, Path(folder) / "cache", Path(folder)))
    step = {layout: statistics.median(seconds) for layout, seconds in times.items()}

    whole, alone = step["1 process, 2 threads"], step["1 process, 1 thread, 8 micro-batches"]
    ideal = alone / 2 * (1 + (2 - 1) / 8)  # half of the work for each, and the bubble of 2 stages
    for layout, seconds in step.items():
        spread = f"{min(times[layout]):.3f} to {max(times[layout]):.3f} s"
        print(f"{layout:38} {seconds:.3f} s a step ({spread}), {whole / seconds:.2f}x one process of two threads")
    rows = {
        "ddp: tokens a second by one process of two threads (goal: 0.9)": whole / step["ddp 2"],
        "1f1b: ideal time by its time (goal: 0.85)": ideal / step["1f1b 2, 8 micro-batches"],
        "tensor: tokens a second by one process of two threads": whole / step["tensor 2"],
    }
    for name, ratio in rows.items():
        print(f"{name}: {ratio:.2f}")
    file = ROOT / "benchmarks" / "results" / f"parallel-{datetime.date.today()}.json"
    about = {"date": str(datetime.date.today()), "torch": torch.__version__, "python": platform.python_version()}
    about["processor"] = platform.processor() or platform.machine()
    file.write_text(json.dumps({**about, "seconds": times, "ratios": rows}, indent=1) + "\n")
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
