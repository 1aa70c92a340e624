"""Every extension point of nanopre: the contract between the core and its plugins (docs/plugins.md explains it).

A plugin offers classes by name through the registration hooks, and observes a run through the lifecycle hooks. Hooks
are called by keyword, so that an implementation may take fewer arguments than the specification has. No hook is
`firstresult`: what is exclusive is chosen by its name, never by who answers first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from nanopre.config import Config

hookspec = pluggy.HookspecMarker("nanopre")

KINDS = {
    "objective": "nanopre_objectives",
    "model": "nanopre_models",
    "optimizer": "nanopre_optimizers",
    "dataset": "nanopre_datasets",
    "parallel": "nanopre_parallel",
    "logger": "nanopre_loggers",
    "analyzer": "nanopre_analyzers",
}
"""The kinds of plugin that are chosen by name, with the hook that offers each."""

METHODS = {
    "objective": ("rows_per_epoch", "batch", "counts", "loss", "report"),
    "model": ("build",),
    "optimizer": ("build",),
    "dataset": ("documents", "fingerprint"),
    "parallel": ("apply",),
    "logger": (),  # lifecycle hooks, at least one
    "analyzer": ("fit",),
}
"""What a class of each kind must be able to do."""

OPTIONAL_METHODS = {
    "optimizer": ("state_bytes",),
    "objective": ("adapt", "columns", "prepare", "evaluate", "sample"),
    "dataset": ("records",),
    "parallel": ("check", "engine"),
    "analyzer": ("refit", "notes", "draw"),
}
"""What a class of a kind may be able to do besides."""

PHASES = ("pipeline", "tensor", "memory", "data", "last")
"""What a parallel strategy's `phase` may be, in the order in which they are applied. Blocks are compiled after "tensor"."""

Register = Callable[[str, type], None]


@dataclass
class Run:
    """What a lifecycle hook gets to see of the run."""

    config: Config
    dir: Path  # runs/<name>
    rank: int  # of this process
    world_size: int
    device: str
    n_parameters: int
    start_step: int  # steps that were done before, if the run resumes
    steps: int  # when the run ends
    tokenizer: Any
    model: Any  # the torch module, without what a parallel strategy wraps around it
    objective: Any


# Registration: called once, when the plugins are loaded, on every rank. `register(name, cls)` offers a dataclass whose
# fields, all with defaults, are the keys of its TOML section.


@hookspec
def nanopre_objectives(register: Register) -> None:
    """Offer objectives: what is made of a corpus's rows, and the loss on it ([objective] name = ...).

    rows_per_epoch(split, seq_len) -> int: how many rows make one pass over a nanopre.data.Split.
    batch(split, rows, seq_len, seed) -> {name: array}: one row of each array for each row number. Depends on its
        arguments alone. seed None means evaluation: the same rows each time, and rows from rows_per_epoch on have no
        targets. "tokens" (rows, seq_len) is the model's input.
    counts(batch, tokenizer) -> {name: number}: what each sum of losses is divided by, for these rows.
    loss(head, h, batch) -> {name: tensor}: sums over the rows, for the last hidden states h (rows, seq_len, d_model);
        `head.cross_entropy(h, targets)` is the usual one. Each needs a count of the same name.
    report(sums, counts) -> {metric: number}: with "loss" among them.

    And where it needs them:
    architectures: which of "decoder", "encoder", "encoder-decoder" it is for.
    adapt(model) -> model, changed before its first weights are drawn (nanopre.model.Head.add_output).
    columns() -> list of names: the objective learns from examples with these columns instead of running text. Its splits
        are then nanopre.examples.Examples.
    prepare(train, val): looks at the Examples before the model is built, and may set fields of its own, which the run's
        config.toml then keeps.
    evaluate(model, split, seq_len) -> {metric: number}, beside those of `report`: such as need decoding.
    sample(run, prompt, options) -> {"text": str or an iterator of its pieces, ...}: what sample.py is to do with a prompt
        and this model, a nanopre.checkpoint.OpenedRun. options: keyword arguments of nanopre.generate.generate. All of
        the result can be written as JSON.
    """


@hookspec
def nanopre_models(register: Register) -> None:
    """Offer model families ([model] name = ...).

    build(vocab_size, seq_len) -> torch.nn.Module with `embed`, `blocks`, `head`, `config` and `init_std`, as
        nanopre.model.Transformer has them.
    """


@hookspec
def nanopre_optimizers(register: Register) -> None:
    """Offer optimizers ([optimizer] name = ...).

    build(model) -> list of torch.optim.Optimizer that share out the model's parameters. The schedule multiplies the
        learning rates that they start with.

    And where it needs them:
    mup: True if it follows `model.config.width_ratio` (nanopre.model.ModelConfig); one that does not is refused muP.
    weights: ("float32", "bfloat16") if it can train both, and keeps the small updates of bfloat16 weights (train.weights).
    state_bytes(kind, n) -> bytes that it keeps for a parameter of n numbers, for plan.py: kind is "matrix" of a block, "end"
        (embeddings and output projection) or "vector". Without it AdamW's 8 n are assumed.
    """


@hookspec
def nanopre_datasets(register: Register) -> None:
    """Offer datasets ([data] corpus = ...).

    documents() -> iterable of texts, or of (text, "train" or "val") where the dataset brings its own split.
    fingerprint() -> str that changes whenever the documents would.

    And for objectives that learn from examples:
    records() -> iterable of {column: text}.
    """


@hookspec
def nanopre_parallel(register: Register) -> None:
    """Offer parallel strategies (keys of [parallel]).

    phase: one of PHASES, which tells when it is applied. Of "pipeline", "tensor" and "data" a layout has one
        strategy each, and it is left out where its ranks are a single one.
    degree: how many ranks a strategy of "pipeline" or "tensor" takes; of "data", how many share a copy of the model.
    apply(parts, layout) -> list of torch.nn.Module: wraps or changes the parts of the model that are this rank's, in a
        nanopre.parallel.Layout.

    And where it needs them:
    check(config, layout, model): raises ValueError where the layout is impossible, in words that follow the strategy's name.
        The model has no numbers yet (device "meta"), and another vocabulary.
    engine(parts, layout, loss, micro): of "pipeline", what runs batches through the parts, with the methods of
        nanopre.parallel.Accumulation. micro: how many rows go through at once.
    uncompiled: why blocks can't be compiled beside it, in words that the user is told; "" where they can.
    """


@hookspec
def nanopre_loggers(register: Register) -> None:
    """Offer loggers (keys of [loggers]): classes with one or more of the lifecycle hooks below as @hookimpl methods."""


@hookspec
def nanopre_analyzers(register: Register) -> None:
    """Offer analyzers of scaling runs (plan.py fit --analyzer ...).

    law: the dataclass that `fit` returns, a nanopre.planning.laws.Law: its fields are the estimates, all of them numbers.
    definition: which parameters count, how FLOPs are counted, what is minimised; in one line. May be a property.
    fit(runs) -> law, of a nanopre.planning.runs.Runs. Raises UserError where the runs don't suffice. Depends on the runs alone.

    And where it needs them:
    refit(runs, law) -> law, from the estimates of an earlier law of nearly the same runs: what a bootstrap calls, if faster.
    notes(runs, law) -> list of sentences: what is worth telling besides the estimates, warnings among them.
    draw(figure, runs, fit): the points that the law was fitted on, and the law, on an empty matplotlib figure; `fit` is a
        nanopre.planning.scaling.Fit. Pieces to draw with are in nanopre.planning.report.
    """


# Lifecycle: called on every rank (run.rank tells which), at most once a step and never inside a compiled forward pass.


@hookspec
def nanopre_run_start(run: Run) -> None:
    """Before the first step."""


@hookspec
def nanopre_step_end(run: Run, step: int, metrics: dict[str, float]) -> None:
    """After each step; `step` counts from 1.

    metrics: what the objective reports of the step ("loss", ...), and "lr", "grad_norm" (before clipping), "tokens" (so
    far), "tokens_per_second", "seconds" (of training, so far), "skipped" (steps, so far), "epoch", and "mfu" where the
    device's peak is known. Of a skipped step the loss or grad_norm is not finite.
    """


@hookspec
def nanopre_evaluation_end(run: Run, step: int, metrics: dict[str, float]) -> None:
    """After an evaluation. metrics: what the objective reports of the validation split ("loss", ...)."""


@hookspec
def nanopre_checkpoint_saved(run: Run, step: int, path: Path) -> None:
    """After a checkpoint is whole and in place; `path` is its folder."""


@hookspec
def nanopre_run_end(run: Run, status: str) -> None:
    """After the last step, also when the run fails. status: "finished", "interrupted" or "failed"."""
