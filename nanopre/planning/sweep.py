"""Small runs that a scaling law can be fitted to: their design within a budget, their runs, and the points that they give.

Every point is the loss after the learning rate has fallen. One trunk at a constant rate serves all token counts of a size
(Hu et al., 2024, section 4.3; Haegele et al., 2024): from the trunk's checkpoint at the place where a shorter run's decay
begins, that run goes on alone. Since a batch depends on (seed, step) only and resuming is exact, this gives the very numbers
of a run of its own from the first step, which each point's TOML describes: a saving, and no approximation.
"""

from __future__ import annotations

import csv
import math
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from nanopre import UserError, checkpoint, config as configs, corpus as corpora, cost
from nanopre.model import ModelConfig
from nanopre.planning.runs import read_log
from nanopre.planning.shape import scaled

MIN_STEPS = 50  # of a run: below, warm-up and decay are all there is


@dataclass
class Point:
    """A run of one size on so many tokens."""

    name: str  # of its TOML, <name>.toml, and of its folder in runs/
    steps: int
    table: dict[str, Any]  # the config

    @property
    def trunk_steps(self) -> int:
        """Steps before its learning rate falls (nanopre.optim.learning_rate_factor)."""
        return self.steps - math.ceil(self.table["schedule"]["decay_fraction"] * self.steps)


@dataclass
class Size:
    """A model's shape with its points, the fewest tokens first."""

    model: ModelConfig
    points: list[Point] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"d{self.model.d_model}-l{self.model.n_layers}"

    @property
    def params(self) -> int:
        """N: all of them, embeddings included."""
        return cost.parameters(self.model)["total"]

    @property
    def steps(self) -> int:
        """Of all its runs together: the trunk, which ends as the longest run, and a decay for each of the others."""
        return self.points[-1].steps + sum(point.steps - point.trunk_steps for point in self.points[:-1])


@dataclass
class Design:
    sizes: list[Size]
    tokens_per_step: int
    unique_tokens: int  # in the corpus

    @property
    def flops(self) -> float:
        """6 N D of all runs."""
        return sum(6.0 * size.params * size.steps * self.tokens_per_step for size in self.sizes)


# ---------------------------------------------------------------------------------------------------------------------
# Design


def ladder(
    approach: str,
    budget: float,
    n_sizes: int,
    n_budgets: int,
    span: float,
    size_ratio: float,
    tokens_per_param: float,
    decay: float,
) -> list[tuple[float, list[float]]]:
    """The parameters of each size, and the budgets (FLOPs, C = 6 N D) at which it is measured, ascending.

    Budgets are geometric, the largest `span` times the smallest; sizes are geometric by `size_ratio`. Around the size that
    `tokens_per_param` makes the best of a budget, `isoflop` places `n_sizes` for each budget anew, on one ladder so that
    neighbouring budgets share trunks; for other approaches the same sizes, around the best of the middle budget, are
    measured at every budget, which gives the widest range of D / N. All runs together, trunks counted once, cost `budget`.
    """
    ratio = span ** (1 / (n_budgets - 1))
    # Everything in units of the largest budget and its best size: N_best is proportional to C**0.5.
    shares = [ratio ** (k + 1 - n_budgets) for k in range(n_budgets)]
    middle = span**-0.25
    served: dict[float, list[float]] = {}
    for share in shares:
        centre = round(math.log(share**0.5 / middle, size_ratio)) if approach == "isoflop" else 0
        for i in range(n_sizes):
            served.setdefault(middle * size_ratio ** (centre + i - (n_sizes - 1) / 2), []).append(share)
    cost = sum(own[-1] + decay * sum(own[:-1]) for own in served.values())
    largest = budget / cost
    best = (largest / (6 * tokens_per_param)) ** 0.5
    return [(size * best, [share * largest for share in own]) for size, own in sorted(served.items())]


def design(config: configs.Config, rungs: Sequence[tuple[float, list[float]]], corpus: corpora.Corpus, out: Path) -> Design:
    """The runs of a ladder, each the config with another model (see `scaled`), steps and schedule.

    The width changes, the learning rate does not: muP carries it over from the config's width (nanopre.model). The warm-up is
    the config's, or a tenth of the size's shortest run where that is less: one that is too long for small runs bends the
    law (Porian et al., 2024, section 3.3).
    Raises UserError where a run is too short, never has a constant rate, or has the name or the model of another.
    """
    if config.init_from:
        raise UserError(
            f"init_from = {config.init_from}: a sweep trains models of many sizes from first weights; leave it out."
        )
    base = configs.to_dict(config)
    train = base["train"]
    tokens_per_step = train["batch_size"] * train["seq_len"]
    sizes: list[Size] = []
    for wanted, budgets in rungs:
        model, settings = scaled(config, wanted, corpus.tokenizer.n_vocab)
        size = Size(settings)
        if any(other.name == size.name for other in sizes):
            raise UserError(
                f"--size-ratio: two of the sizes, near {wanted:.3g} parameters, are the same model, {size.name}; raise it, or "
                "give the config's model narrower heads, whose width is the step between models."
            )
        steps = [round(budget / (6.0 * size.params * tokens_per_step)) for budget in budgets]
        if steps[0] < MIN_STEPS:
            raise UserError(
                f"--budget: {size.name} has {steps[0]} steps of {tokens_per_step:,} tokens, and {MIN_STEPS} are the "
                "fewest that make sense; raise the budget, or lower train.batch_size, --sizes or --span."
            )
        schedule = {**base["schedule"], "name": "wsd", "warmup_steps": min(base["schedule"]["warmup_steps"], steps[0] // 10)}
        for budget, n in zip(budgets, steps, strict=True):
            point = f"{size.name}-{budget:.2g}".replace("e+", "e")
            if any(other.name == point for other in size.points):
                raise UserError(
                    f"--span: two budgets near {budget:.2g} FLOPs would have one name; raise it, or lower --budgets."
                )
            table = {
                **base,
                "name": point,
                "out_dir": str(out / "runs"),
                "model": model,
                "schedule": schedule,
                "train": {**train, "steps": n, "eval_interval": n, "samples": 0},
                "checkpoint": {**base["checkpoint"], "keep_last": 1, "keep_best": False},
            }
            size.points.append(Point(point, n, table))
        if size.points[0].trunk_steps < 1:
            raise UserError(
                f"schedule.decay_fraction = {schedule['decay_fraction']:g}: leaves no steps at a constant rate; lower it."
            )
        sizes.append(size)
    return Design(sizes, tokens_per_step, corpus.train.n_tokens)


def write(plan: Design, out: Path) -> None:
    """A TOML for each point, in `out`. Raises UserError where another sweep is there, or it can't be written."""
    texts = {f"{point.name}.toml": tomli_w.dumps(point.table) for size in plan.sizes for point in size.points}
    try:
        there = {file.name: file.read_text(encoding="utf-8") for file in out.glob("*.toml")}
        if there and there != texts:
            raise UserError(f"--out {out}: holds another sweep; name a new folder, or repeat the command that made this one.")
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror}).") from None


# ---------------------------------------------------------------------------------------------------------------------
# Run


class Runner:
    """Runs the sizes of a design, `jobs` at a time. What is done already is not done again: the folders in runs/ tell.

    launch: a command with {train}, which is replaced by train.py, and {config}, by its arguments.
    """

    def __init__(self, out: Path, train: Path, launch: str, jobs: int):
        self.out, self.jobs = out, jobs
        try:
            self.launch = shlex.split(launch)
        except ValueError as error:
            raise UserError(f"--launch {launch!r}: {str(error).lower()}; quote its words as a shell does.") from None
        if "{train}" not in self.launch or "{config}" not in self.launch:
            raise UserError(
                f"--launch {launch!r}: lacks the words {{train}} and {{config}}, as in 'python {{train}} {{config}}'."
            )
        self.train = train
        self.processes: set[subprocess.Popen] = set()
        # Jobs share the cores: threads of several that wait for each other on one core take many times as long.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
        self.environment = {**threads, **os.environ}
        self.stopping = False

    def run(self, plan: Design) -> None:
        """Run what is left. Raises UserError for the first run that fails or stops early, after the others that are under way
        were asked to save and stop."""
        costly_first = sorted(plan.sizes, key=lambda size: -size.params * size.steps)
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self.run_size, size) for size in costly_first]
            before = signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                for future in as_completed(futures):
                    future.result()
            except KeyboardInterrupt:
                print("stopping as soon as what runs is saved; the same command goes on from there", flush=True)
                raise
            finally:
                self.stopping = True
                for process in list(self.processes):
                    process.terminate()
                signal.signal(signal.SIGTERM, before)

    def run_size(self, size: Size) -> None:
        """The trunk lives in the folder of the size's longest run, which goes on from it; the others start as copies."""
        *shorter, longest = size.points
        for point in shorter:
            if self.steps_done(point) == 0:
                self.advance(longest, point.trunk_steps, constant=True)
                self.copy(longest, point)
            self.advance(point, point.steps)
        self.advance(longest, longest.steps)

    def folder(self, point: Point) -> Path:
        return self.out / "runs" / point.name

    def steps_done(self, point: Point) -> int:
        saved = checkpoint.pointed(self.folder(point), "latest")
        return checkpoint.read_info(saved)["step"] if saved else 0

    def advance(self, point: Point, steps: int, constant: bool = False) -> None:
        """Train the point's run up to this step, at a constant rate after the warm-up or with the decay."""
        done, folder = self.steps_done(point), self.folder(point)
        if done >= steps or self.stopping:
            return
        if done:
            start = ["--resume", str(folder)]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # a run that was killed before its first checkpoint
            start = [str(self.out / f"{point.name}.toml")]
        schedule = "constant" if constant else "wsd"
        flags = [f"--train.steps={steps}", f"--train.eval_interval={steps}", f"--schedule.name={schedule}"]
        words = {"{train}": [str(self.train)], "{config}": [*start, *flags]}
        command = [word for part in self.launch for word in words.get(part, [part])]
        log = self.out / "logs" / f"{point.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8") as output:
            try:  # in a session of its own: of a Ctrl-C it hears by `run` alone, as a second signal would end it without saving
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=self.environment
                )
            except OSError as error:
                raise UserError(f"--launch: {command[0]} can't be started ({error.strerror}).") from None
            self.processes.add(process)
            if self.stopping:
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            said = lines[-1] if lines else "no output"
            raise UserError(f"{point.name}: train.py ended with status {code} ({said}); see {log}.")
        if (done := self.steps_done(point)) < steps:
            raise UserError(f"{point.name}: stopped after step {done} of {steps}; the same command goes on.")
        if not constant:
            print(f"{point.name}: validation loss {final_loss(folder, steps):.4f}", flush=True)

    def copy(self, trunk: Point, point: Point) -> None:
        """Let the point's run begin as the trunk is now. It has its name when it is whole."""
        if (done := self.steps_done(trunk)) > point.trunk_steps and not self.stopping:
            raise UserError(
                f"{self.folder(point)}: was to start from step {point.trunk_steps} of {self.folder(trunk)}, which is at step "
                f"{done}; remove the second folder too, so that both are run again."
            )
        temporary = self.out / "runs" / f"{point.name}.copy"
        shutil.rmtree(temporary, ignore_errors=True)
        if not self.stopping:
            shutil.copytree(self.folder(trunk), temporary)
            temporary.rename(self.folder(point))


def final_loss(folder: Path, steps: int) -> float | None:
    """The run's validation loss after its last step; None: it is not there yet. A trunk is evaluated at its branches, too:
    no points, since its rate is still at the peak there."""
    log = folder / "log.jsonl"
    records = [record for _, record in read_log(log)] if log.exists() else []
    return next((record["val_loss"] for record in records if "val_loss" in record and record["step"] == steps), None)


# ---------------------------------------------------------------------------------------------------------------------
# Collect


def collect(plan: Design, out: Path) -> list[dict[str, Any]]:
    """The points of all runs that are done, by the columns of Runs. A `run` is a size. Those with a loss go to points.csv; of a
    model that was lost in training it is None."""
    rows = []
    for size in plan.sizes:
        for point in size.points:
            loss = final_loss(out / "runs" / point.name, point.steps)
            tokens = point.steps * plan.tokens_per_step
            if loss is not None:
                rows.append({
                    "params": size.params,
                    "tokens": tokens,
                    "loss": loss if math.isfinite(loss) else None,
                    "flops": 6.0 * size.params * tokens,
                    "run": size.name,
                    "unique_tokens": min(tokens, plan.unique_tokens),
                    "embedding_params": size.params - cost.parameters(size.model)["blocks"],
                    "d_model": size.model.d_model,
                    "n_layers": size.model.n_layers,
                    "batch_size": plan.tokens_per_step,
                })  # fmt: skip
    if rows:
        with open(out / "points.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(row for row in rows if row["loss"] is not None)
    return rows


def table(plan: Design, rows: Sequence[dict[str, Any]]) -> str:
    """The design, a line a run, with the losses that are there."""
    losses = {(row["run"], row["tokens"]): "lost" if row["loss"] is None else f"{row['loss']:.4f}" for row in rows}
    lines = [f"{'run':<22}{'N':>15}{'steps':>9}{'tokens':>17}{'D / N':>8}{'FLOPs':>10}{'loss':>9}"]
    for size in plan.sizes:
        for point in size.points:
            tokens = point.steps * plan.tokens_per_step
            lines.append(
                f"{point.name:<22}{size.params:>15,}{point.steps:>9,}{tokens:>17,}"
                f"{tokens / size.params:>8.1f}{6.0 * size.params * tokens:>10.2e}{losses.get((size.name, tokens), ''):>9}"
            )
    lines.append(
        f"{plan.flops:.3g} FLOPs in all (6 N D, N with embeddings; a size's runs share their trunk); {len(rows)} runs are done."
    )
    if any(size.points[-1].steps * plan.tokens_per_step > plan.unique_tokens for size in plan.sizes):
        lines.append(
            f"Some runs see the corpus's {plan.unique_tokens:,} tokens more than once: fresh ones would do more for them."
        )
    return "\n".join(lines)
