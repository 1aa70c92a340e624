"""Short trials of a configured training: which learning rate it bears, and which micro-batch is the fastest."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanopre import UserError, checkpoint, config as configs, corpus as corpora, distributed, machine, optim, parallel
from nanopre.examples import prepare as prepare_examples
from nanopre.plugins import Registry


class Trial:
    """The configured training in one process, without a run's folder. Strategies that need other ranks are left out."""

    def __init__(self, config: configs.Config, plugins: Registry):
        alone = {name: s for name, s in config.parallel.items() if s.phase in ("memory", "last")}
        self.config = config = dataclasses.replace(config, parallel=alone)
        self.here = machine.choose(config.train)
        self.layout = parallel.plan(config, plugins, distributed.World(0, 0, 1, self.here.device))
        tokenizer = checkpoint.read_tokenizer(config.init_from) if config.init_from else None
        prepare = prepare_examples if hasattr(config.objective, "columns") else corpora.prepare
        self.corpus = prepare(config, plugins, tokenizer)
        model = distributed.build_model(config, self.corpus.tokenizer)
        if config.init_from and config.init_weights:
            checkpoint.load_weights(config.init_from, model)
        if config.train.weights == "bfloat16":
            for p in model.parameters():
                p.data = p.data.bfloat16()
        model, (example, _) = model.to(self.here.device), self.rows(np.arange(1))
        self.parts, self.engine = parallel.apply(self.layout, model, self.here, config.objective.loss, config, example)
        self.optimizers = [optimizer for part in self.parts for optimizer in optim.build(config.optimizer, part)]
        self.peaks = optim.peak_rates(self.optimizers)

    def rows(self, rows: np.ndarray) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """(batch on the device, what its sums of losses are divided by)."""
        c = self.config
        arrays = c.objective.batch(self.corpus.train, rows, c.train.seq_len, c.seed)
        batch = {key: torch.from_numpy(np.ascontiguousarray(array)).to(self.here.device) for key, array in arrays.items()}
        return batch, c.objective.counts(arrays, self.corpus.tokenizer)

    def step(self, step: int, factor: float) -> tuple[float, int]:
        """One step at `factor` times the configured rates. Returns (loss before it, tokens)."""
        c = self.config
        batch, counts = self.rows(step * c.train.batch_size + np.arange(c.train.batch_size))
        optim.set_rates(self.optimizers, self.peaks, factor)
        distributed.seed_step(c.seed, step, 0)
        totals = self.layout.world.sum(counts)
        sums = self.engine.forward_backward(batch, totals)
        parallel.clip_gradients(self.layout, self.parts, c.train.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        values = ({key: float(value) for key, value in table.items()} for table in (sums, totals))
        return c.objective.report(*values)["loss"], batch["tokens"].numel()


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate


@dataclass
class RangeTest:
    """A learning-rate range test (Smith, 2017, section 3.3): the rate rises step by step until the loss does."""

    rates: list[float] = field(default_factory=list)  # of the steps that were made
    losses: list[float] = field(default_factory=list)
    smooth: list[float] = field(default_factory=list)  # exponential means of the losses, over about ten steps

    @property
    def lowest(self) -> int:
        """The step at which the smoothed loss is least."""
        return int(np.nanargmin(self.smooth))  # the last may be nan, where the test ended

    @property
    def biggest(self) -> float | None:
        """The last rate before the loss has lost a fifth of what it had gained; None: it never did, or had gained nothing."""
        if self.lowest == 0:
            return None
        limit = self.smooth[self.lowest] + BLOWN * (self.smooth[0] - self.smooth[self.lowest])
        after = (i for i in range(self.lowest, len(self.rates)) if not self.smooth[i] <= limit)
        step = next(after, None)
        return None if step is None else self.rates[step - 1]

    @property
    def recommended(self) -> float:
        """A tenth of the rate at which the loss is least (Howard and Gugger, 2020, chapter 5): a run stays at its peak rate for
        longer than this test does."""
        return self.rates[self.lowest] / 10

    def text(self) -> str:
        """The curve in 12 lines, and what follows from it."""
        height, width = 12, 72
        top, bottom = max(self.smooth[0], self.smooth[self.lowest]), self.smooth[self.lowest]
        columns = np.array_split(np.fmin(self.smooth, top), min(width, len(self.smooth)))
        rows = [round((top - column.mean()) / max(top - bottom, 1e-9) * (height - 1)) for column in columns]
        lines = ["".join("*" if row == y else " " for row in rows).rstrip() for y in range(height)]
        lines = [f"{top - y / (height - 1) * (top - bottom):8.3f} |{line}" for y, line in enumerate(lines)]
        axis = f"{'  learning rate, geometric  ':^{max(0, len(rows) - 10)}}"
        lines.append(f"{'loss':>8}  {self.rates[0]:.0e}{axis}{self.rates[-1]:.0e}")
        if self.lowest == 0:
            return "\n".join([*lines, f"The loss never fell from {self.rates[0]:.2g} on: lower --low."])
        if self.biggest is None:
            lines.append(f"No blow-up up to {self.rates[-1]:.2g}: raise --high.")
        else:
            lines.append(
                f"The biggest that does not blow up: {self.biggest:.2g} (beyond it {BLOWN:.0%} of the loss's fall are lost "
                "again; Smith, 2017, section 3.3)."
            )
        lines.append(
            f"Recommended: optimizer.lr = {self.recommended:.2g}, a tenth of the rate where the loss is least "
            f"({self.rates[self.lowest]:.2g}; Howard and Gugger, 2020, chapter 5)."
        )
        return "\n".join(lines)

    def draw(self, figure) -> None:
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="0.8", lw=1, label="each step")
        axes.plot(self.rates, self.smooth, label="smoothed")
        for rate, words in ((self.biggest, "the biggest that does not blow up"), (self.recommended, "recommended")):
            if rate is not None:
                axes.axvline(rate, ls="--", color="C1" if rate == self.biggest else "C2", label=f"{rate:.2g}: {words}")
        axes.set(xscale="log", xlabel="optimizer.lr", ylabel="loss")
        axes.set_ylim(self.smooth[self.lowest] - 0.2, 1.1 * self.smooth[0])
        axes.legend(frameon=False, fontsize=8)


BLOWN = 0.2  # of the loss's fall: a rise by so much is no noise of batches


def range_test(config: configs.Config, plugins: Registry, low: float, high: float, steps: int) -> RangeTest:
    """Raise optimizer.lr from `low` to `high`, geometrically, in so many steps; all other rates rise with it. It ends early
    where the loss is not finite, or above its first by half."""
    lr = getattr(config.optimizer, "lr", 0)
    if not lr:
        raise UserError(
            f'optimizer "{config.optimizer._plugin_name}": has no lr above 0 to begin from; a range test needs one.'
        )
    trial = Trial(config, plugins)
    test, mean = RangeTest(), 0.0
    for step in range(steps):
        rate = low * (high / low) ** (step / (steps - 1))
        loss, _ = trial.step(step, rate / lr)
        if step == 0 and not math.isfinite(loss):
            raise UserError(f"the loss is {loss} before the first step, so that no rate can be to blame.")
        mean = 0.9 * mean + 0.1 * loss
        test.rates.append(rate)
        test.losses.append(loss)
        test.smooth.append(mean / (1 - 0.9 ** (step + 1)))
        if not loss <= 1.5 * test.losses[0]:
            break
    return test


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batch


@dataclass
class Measured:
    """One micro-batch size, tried."""

    rows: int
    tokens_per_second: float | None  # None: it does not fit
    memory: int | None  # bytes at the peak: of the GPU's tensors, or of the whole process on a CPU

    @property
    def fits(self) -> bool:
        return self.tokens_per_second is not None


def largest_batch(measure: Callable[[int], Measured], up_to: int) -> list[Measured]:
    """Every size that was tried, by size: doubled from 1 until one does not fit, then halfway between until the largest that
    fits is found, `up_to` at most."""
    tried = [measure(1)]
    while tried[-1].fits and tried[-1].rows < up_to:
        tried.append(measure(min(2 * tried[-1].rows, up_to)))
    low = max((m.rows for m in tried if m.fits), default=0)
    high = min((m.rows for m in tried if not m.fits), default=low + 1)
    while high - low > 1:
        middle = measure((low + high) // 2)
        tried.append(middle)
        low, high = (middle.rows, high) if middle.fits else (low, middle.rows)
    return sorted(tried, key=lambda m: m.rows)


def measure_batch(table: dict[str, Any], rows: int, steps: int, limit: float) -> Measured:
    """Train a few steps with micro-batches of so many rows in a process of its own, whose peak of memory is then its own.

    table: the config (nanopre.config.to_dict). limit: bytes that a CPU's process may take. A process that the system kills
    counts as one that does not fit.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(table, rows, steps, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:  # it ended before it could answer
        answer = None
    process.join()
    if answer is None and process.exitcode > 0:
        raise UserError(f"the trial with {rows} rows failed; its error stands above.")
    if isinstance(answer, str):
        raise UserError(answer)
    speed, memory = answer or (None, None)
    on_cpu = table["train"]["device"] == "cpu"
    return Measured(rows, None if on_cpu and memory is not None and memory > limit else speed, memory)


def _measure(table: dict[str, Any], rows: int, steps: int, sender) -> None:
    train = {**table["train"], "batch_size": rows, "micro_batch_size": rows}
    sys.stdout = sys.stderr  # plan.py's own output is for its result
    try:
        trial = Trial(*configs.from_dict({**table, "train": train}, "the config"))
        seconds = []
        for step in range(1 + steps):  # the first is slower: it makes the optimizer's states, and compiles
            began = time.perf_counter()
            _, tokens = trial.step(step, 1.0)
            if trial.here.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        sender.send((tokens / float(np.median(seconds[1:])), peak_memory(trial.here.device)))
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        sender.send((None, None))
    except UserError as error:
        sender.send(str(error))


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_memory() -> int:
    """Bytes that new processes can have without swapping."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # Linux knows better: it can also give back what caches hold
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return pages


def batch_text(tried: Sequence[Measured], up_to: int, limit: float | None) -> str:
    """A line a size, and what follows. limit: bytes, on a CPU."""
    lines = [f"{'rows':>8}{'tokens/s':>14}{'peak GiB':>11}"]
    for m in tried:
        speed = f"{m.tokens_per_second:,.0f}" if m.fits else "does not fit"
        lines.append(f"{m.rows:>8}{speed:>14}{'' if m.memory is None else f'{m.memory / 2**30:.2f}':>11}")
    fitting = [m for m in tried if m.fits]
    within = "" if limit is None else f" in {limit / 2**30:.3g} GiB (--memory)"
    if not fitting:
        return "\n".join([*lines, f"Not even one row fits{within}."])
    largest, fastest = fitting[-1], max(fitting, key=lambda m: m.tokens_per_second)
    tie = next(m for m in fitting if m.tokens_per_second >= 0.97 * fastest.tokens_per_second)
    lines.append(
        f"The largest micro-batch that fits{within}: {largest.rows} rows"
        + (", all that was asked for (--up-to)." if largest.rows == up_to else ".")
    )
    lines.append(
        f"The fastest: {fastest.rows} rows. The smallest within 3% of it, train.micro_batch_size = {tie.rows}, leaves memory."
    )
    return "\n".join(lines)
