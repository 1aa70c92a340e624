"""The live line on the terminal; plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanopre import hookimpl


@dataclass
class ConsoleLine:
    """Show step, loss, validation loss, tokens/s, MFU and the time left, live on a terminal or as lines elsewhere."""

    line_interval: int = 0  # steps between printed lines; 0: none on a terminal, train.log_interval elsewhere

    @hookimpl
    def nanopre_run_start(self, run):
        self.progress, self.val = None, ""
        self.start = time.monotonic()
        self.every = self.line_interval
        if run.rank == 0 and sys.stdout.isatty():
            columns = [BarColumn(20), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}")]
            self.progress = Progress(*columns, TimeRemainingColumn(), console=Console(), refresh_per_second=4)
            self.task = self.progress.add_task("", total=run.steps, completed=run.start_step)
            self.progress.start()
        elif run.rank == 0:
            self.every = self.every or run.config.train.log_interval

    @hookimpl
    def nanopre_step_end(self, run, step, metrics):
        if run.rank != 0:
            return
        parts = [f"loss {metrics['loss']:.3f}{self.val}", f"{metrics['tokens_per_second']:,.0f} tokens/s"]
        if "mfu" in metrics:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        if metrics["skipped"]:
            parts.append(f"{metrics['skipped']:.0f} steps skipped")
        text = "  ".join(parts)
        if self.progress:
            self.progress.update(self.task, completed=step, description=text)
        if self.every and (step % self.every == 0 or step == run.steps):
            pace = (time.monotonic() - self.start) / (step - run.start_step)  # seconds a step, evaluations included
            self._print(f"step {step}/{run.steps}  {text}  {_clock(pace * (run.steps - step))} left")

    @hookimpl
    def nanopre_evaluation_end(self, run, step, metrics):
        if run.rank == 0:
            self.val = f"  val {metrics['loss']:.3f}"
            rest = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "loss")
            self._print(f"step {step}/{run.steps}  validation loss {metrics['loss']:.4f}  {rest}")

    @hookimpl
    def nanopre_run_end(self, run, status):
        if self.progress:
            self.progress.stop()

    def _print(self, text: str) -> None:
        (self.progress.console.print if self.progress else print)(text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@hookimpl
def nanopre_loggers(register):
    register("console", ConsoleLine)
