"""What splitting a run over processes costs: two processes of one thread beside one process of two threads.

    python benchmarks/parallel.py
"""

from __future__ import annotations

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

from nanopre.command_line import Parser, at_least, run_script

ROOT = Path(__file__).parents[1]

# About 10M parameters, 4,096 tokens a step; every step does the same products in every layout. With AdamW: each rank of ddp
# takes the whole optimizer step, and Muon's, which is half a second of one thread here, would hide what is measured.
RUN = [
    "--model.name=gpt2", "--model.n_layers=6", "--model.d_model=384", "--model.n_heads=6", "--tokenizer.name=bytes",
    "--optimizer.name=adamw", "--train.batch_size=16", "--train.seq_len=256", "--train.samples=0", "--train.device=cpu",
    "--data.val_fraction=0", "--checkpoint.interval=0", f"--data.corpus={ROOT}/nanopre/*.py",
]  # fmt: skip
# (processes, threads of each, flags, rows in a micro-batch to choose from). How many go best through the model at once
# depends on caches, and so on the threads: each layout has the best of its sizes. The pipeline's are as its schedule has them.
LAYOUTS = {
    "1 process, 2 threads": (1, 2, [], (2, 4, 8, 16)),
    "1 process, 1 thread, 8 micro-batches": (1, 1, [], (2,)),
    "ddp 2": (2, 1, ["--parallel.ddp={}"], (2, 4, 8)),
    "fsdp 2": (2, 1, ["--parallel.fsdp={}"], (4, 8)),  # each micro-batch gathers the parameters
    "tensor 2": (2, 1, ["--parallel.tensor.degree=2"], (4, 8, 16)),
    "1f1b 2, 8 micro-batches": (2, 1, ["--parallel.pipeline.microbatches=8"], (2,)),
}


def step_time(layout: str, micro: int, steps: int, folder: Path) -> float:
    """The median step of a run in seconds, without its first steps."""
    processes, threads, flags, _ = LAYOUTS[layout]
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        flags = [*flags, f"--train.micro_batch_size={micro}", f"--train.steps={steps}", f"--out_dir={out}"]
        command = map(str, [*launch, ROOT / "train.py", *RUN, *flags, f"--data.cache_dir={folder}/cache"])
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment)
        lines = [json.loads(line) for line in next(Path(out).glob("*/log.jsonl")).read_text().splitlines()]
    return 4096 / statistics.median([line["tokens_per_second"] for line in lines if "tokens_per_second" in line][2:])


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=at_least(1), default=8, help="of each run (default: 8)")
    parser.add_argument("--turns", type=at_least(1), default=3, help="in each of which every layout runs once (default: 3)")
    a = parser.parse_args(argv)
    load = os.getloadavg()[0]  # by others, before the runs make their own
    with tempfile.TemporaryDirectory() as folder:
        tried = {
            layout: {micro: step_time(layout, micro, a.steps, Path(folder)) for micro in sizes}
            for layout, (_, _, _, sizes) in LAYOUTS.items()
        }
        best = {layout: min(times, key=times.get) for layout, times in tried.items()}
        times: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
        for _ in range(a.turns):
            for layout in LAYOUTS:
                times[layout].append(step_time(layout, best[layout], a.steps, Path(folder)))
    step = {layout: statistics.median(seconds) for layout, seconds in times.items()}

    whole, alone = step["1 process, 2 threads"], step["1 process, 1 thread, 8 micro-batches"]
    ideal = alone / 2 * (1 + (2 - 1) / 8)  # half of the work for each, and the bubble of 2 stages
    print(f"load at the start: {load:.2f}")
    for layout, seconds in step.items():
        spread = f"{min(times[layout]):.3f} to {max(times[layout]):.3f} s"
        sizes = f"{best[layout]} of {', '.join(map(str, tried[layout]))} rows at a time"
        print(f"{layout:38} {seconds:.3f} s a step ({spread}), {sizes}, {whole / seconds:.2f}x one process of two threads")
    rows = {
        "ddp: tokens a second by one process of two threads (goal: 0.9)": whole / step["ddp 2"],
        "1f1b: ideal time by its time (goal: 0.85)": ideal / step["1f1b 2, 8 micro-batches"],
        "tensor: tokens a second by one process of two threads": whole / step["tensor 2"],
        "fsdp: tokens a second by one process of two threads": whole / step["fsdp 2"],
    }
    for name, ratio in rows.items():
        print(f"{name}: {ratio:.2f}")
    file = ROOT / "benchmarks" / "results" / f"parallel-{datetime.date.today()}.json"
    about = {"date": str(datetime.date.today()), "torch": torch.__version__, "python": platform.python_version()}
    about |= {"processor": platform.processor() or platform.machine(), "load at the start": load}
    results = {"seconds by micro-batch": tried, "micro-batch": best, "seconds": times, "ratios": rows}
    file.write_text(json.dumps({**about, **results}, indent=1) + "\n")
    print(f"written: {file.relative_to(ROOT)}")


if __name__ == "__main__":
    run_script("parallel.py", main)
