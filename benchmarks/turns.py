"""Programs that take turns: each is a process that holds its model and does k steps when it is told to.

`Worker` and `alternate` are the side that tells, `Turns` the side that is told (benchmarks/peers/).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]


REPORT = "turn: "
"""How a line of a worker's stdout begins that is a report; the rest is what the program prints by itself."""


class Turns:
    """What a program calls after each step. The first is its warm-up; then each turn is asked for on stdin."""

    def __init__(self):
        self.left, self.began = 1, time.perf_counter()

    def tick(self) -> None:
        """A step is done. At the end of a turn: report it, then wait for the next, or end the process."""
        self.left -= 1
        if self.left:
            return
        report = {"seconds": time.perf_counter() - self.began, "memory": peak_memory()}
        print(REPORT + json.dumps(report), flush=True)
        asked = sys.stdin.readline()
        if not asked:
            os._exit(0)  # nothing is saved, and no thread is waited for
        self.left, self.began = int(asked), time.perf_counter()


def peak_memory() -> int:
    """Bytes: of the GPU's allocator where this process has used one, else of the whole process."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Worker:
    """A program that calls Turns.tick, started, and past its first step. Raises RuntimeError where it ends by itself."""

    def __init__(self, command: Sequence[str | Path], log: Path, threads: int, cwd: Path = ROOT):
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        # What torch.compile has made in earlier runs would shorten the start of this one.
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(log.with_suffix(".inductor"))
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "benchmarks"]))
        began = time.perf_counter()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                cwd=cwd, env=environment,
            )  # fmt: skip
        self.memory = 0  # bytes, the peak so far
        self._report()
        self.startup = time.perf_counter() - began  # seconds, from the command to the end of the first step

    def turn(self, steps: int) -> float:
        """Seconds a step, of so many steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._report() / steps

    def _report(self) -> float:
        for line in self.process.stdout:
            if line.startswith(REPORT):
                report = json.loads(line.removeprefix(REPORT))
                self.memory = report["memory"]
                return report["seconds"]
        self.process.wait()
        raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended:\n{self.log.read_text()[-2000:]}")

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def alternate(commands: dict[str, Sequence[str | Path]], steps: int, turns: int, folder: Path, threads: int) -> dict[str, dict]:
    """Start all the programs, one after the other, then let them do `steps` steps each in turns (A B C A B C ...).

    For each: "seconds" a step of every turn, "startup" in seconds, "memory", its peak in bytes.
    """
    workers: dict[str, Worker] = {}
    try:
        for name, command in commands.items():
            workers[name] = Worker(command, folder / f"{name.replace(' ', '-')}.log", threads)
        for worker in workers.values():
            worker.turn(1)
        seconds = {name: [] for name in workers}
        for _ in range(turns):
            for name, worker in workers.items():
                seconds[name].append(worker.turn(steps))
    finally:
        for worker in workers.values():
            worker.close()
    return {n: {"seconds": seconds[n], "startup": w.startup, "memory": w.memory} for n, w in workers.items()}


def ratio(slower: dict, faster: dict) -> float:
    """The median over the turns of one program's time by another's in the same turn."""
    return median(a / b for a, b in zip(slower["seconds"], faster["seconds"], strict=True))


def about(threads: int) -> dict:
    """What a figure depends on beside the code."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "date": date.today().isoformat(),
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "threads": threads,
        "load_at_start": os.getloadavg()[0],
        "versions": versions,
    }


def checkout(text: str) -> Path:
    """An argparse type: the folder of a checkout of nanoGPT."""
    if not (Path(text) / "train.py").exists():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of karpathy/nanoGPT: it has no train.py")
    return Path(text).resolve()


def save(result: dict, folder: Path, name: str, shapes: str) -> Path:
    """Write a benchmark's result, which has what `about` says, to NAME-DATE.json in the folder, made if need be; of
    tiny shapes to NAME-tiny-DATE.json, so that a test of a script is no table."""
    name += "" if shapes == "full" else f"-{shapes}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{result['date']}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file
