"""From measured runs and a budget to the next run.

    python plan.py COMMAND --help        what a command takes; every command has --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from nanopre import (
    UserError,
    accelerators,
    checkpoint,
    config as configs,
    corpus as corpora,
    cost,
    machine,
    parallel,
    timetable,
)
from nanopre.command_line import Parser, at_least, positive, run_script
from nanopre.distributed import World
from nanopre.planning import budget, layouts, memory, preview, proposal, recipe, report, scaling, shape, sweep, trial, upscale
from nanopre.planning.laws import PUBLISHED
from nanopre.planning.runs import Runs, measured_seconds, read_runs
from nanopre.plugins import Registry, load_plugins, nearest

HERE = Path(__file__).parent


def command_line() -> Parser:
    parser = Parser(prog="plan.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    of_runs, of_configs = (add_fit, add_compare, add_budget), (add_memory, add_layout, add_schedule)
    for add in (*of_runs, *of_configs, add_sweep, add_lr, add_batch, add_upscale):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: list[str]) -> None:
    a, a.overrides = command_line().parse_known_args(argv)
    with redirect_stdout(sys.stderr):  # what is said on the way
        result, text = a.run(a)
    print(json.dumps(result, indent=1) if a.json else text)


def add_config(command: argparse.ArgumentParser) -> None:
    """What all commands of a config take."""
    command.add_argument("config", help="a TOML file as train.py takes it; --section.key=value sets a key of it")
    command.sets_keys = True


# fit and compare: laws of measured runs.


def add_fit(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("fit", help="fit a scaling law to measured runs")
    command.add_argument("--analyzer", default="parametric", help="which law (default: parametric)")
    command.add_argument("--flops", type=positive, help="also say how the law would spend this budget")
    command.add_argument("--out", metavar="FILE", help="write the law, for plan.py budget --law FILE")
    add_runs(command, bootstrap=200)
    command.set_defaults(run=run_fit)
    return command


def add_compare(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("compare", help="fit every law to the same runs, side by side")
    command.add_argument("--flops", type=positive, help="the budget to compare at (default: 10 times the largest run's)")
    add_runs(command, bootstrap=100)
    command.set_defaults(run=run_compare)
    return command


def add_runs(command: argparse.ArgumentParser, bootstrap: int) -> None:
    """What `fit` and `compare` both take."""
    command.add_argument("runs", nargs="+", help="folders of runs, .csv or .jsonl files with params, tokens, loss")
    command.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="as params=N: a file's column")
    command.add_argument("--metric", default="val_loss", help="of log.jsonl, what is the loss (default: val_loss)")
    command.add_argument("--last", action="store_true", help="only the last point of each run")
    command.add_argument(
        "--drop-highest", type=at_least(0), default=0, metavar="K", help="leave out the K highest losses"
    )
    command.add_argument("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="an analyzer's option")
    command.add_argument("--plugins", action="append", default=[], metavar="PATH", help="a file or folder of plugins")
    command.add_argument(
        "--bootstrap", type=at_least(0), default=bootstrap, metavar="N",
        help=f"resamples that intervals are from (default: {bootstrap})",
    )  # fmt: skip
    command.add_argument("--seed", type=at_least(0), default=0, help="of the resamples (default: 0)")
    command.add_argument("--figures", metavar="FOLDER", help="write a PNG for each law")
    command.add_argument("--report", metavar="FILE.html", help="write one page with tables and figures")


def run_fit(a: argparse.Namespace) -> tuple[dict, str]:
    plugins = load_plugins(a.plugins, where="--plugins")
    runs = chosen_runs(a)
    (analyzer,) = analyzers(a, plugins, [a.analyzer]).values()
    fit = scaling.fit(analyzer, a.analyzer, runs, a.bootstrap, a.seed)
    if a.out:
        write(a.out, json.dumps(fit.to_dict()))
    write_figures(a, {a.analyzer: analyzer}, {a.analyzer: fit}, runs, a.flops)
    result = fit.to_dict()
    if a.flops:
        result["allocation"] = allocation(fit, a.flops)
    return result, report.fit_text(fit, runs, a.flops)


def run_compare(a: argparse.Namespace) -> tuple[dict, str]:
    plugins = load_plugins(a.plugins, where="--plugins")
    runs = chosen_runs(a)
    flops = a.flops or 10 * runs.flops.max()
    chosen = analyzers(a, plugins, sorted(plugins.offers("analyzer")))
    fits: dict[str, scaling.Fit | str] = {}
    for name, analyzer in chosen.items():
        try:
            fits[name] = scaling.fit(analyzer, name, runs, a.bootstrap, a.seed)
        except UserError as error:
            fits[name] = str(error)
    write_figures(a, chosen, fits, runs, flops)
    rows = {
        name: {"reason": fit} if isinstance(fit, str) else fit.to_dict() | {"allocation": allocation(fit, flops)}
        for name, fit in fits.items()
    }
    for row in rows.values():
        row.pop("bootstrap", None)  # hundreds of numbers a law, which fit --json and --out have
    return {"flops": flops, "laws": rows}, report.comparison_text(fits, runs, flops)


def chosen_runs(a: argparse.Namespace) -> Runs:
    """The points that the flags name."""
    columns = {}
    for text in a.column:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise UserError(f"--column {text}: it must be like params=N, nanopre's name first.")
        columns[ours] = theirs
    runs = read_runs(a.runs, columns, a.metric)
    if a.last:
        runs = runs.last()
    if a.drop_highest >= len(runs):
        raise UserError(f"--drop-highest {a.drop_highest}: the runs have {len(runs)} points.")
    return runs[np.sort(np.argsort(runs.loss, kind="stable")[: len(runs) - a.drop_highest])]


def analyzers(a: argparse.Namespace, plugins: Registry, names: list[str]) -> dict[str, Any]:
    """The analyzers of these names, with the options that --option gives them."""
    tables: dict[str, dict[str, Any]] = {}
    for name in names:
        plugins.get("analyzer", name, "--analyzer")
        tables[name] = {"name": name}
    for text in a.option:
        name, dot, option = text.partition("=")[0].partition(".")
        if "=" not in text or not dot or name not in tables:
            raise UserError(f"--option {text}: it must be like {names[0]}.KEY=VALUE, with the name of {' or '.join(names)}.")
        _, tables[name][option], _ = configs.parse_override(f"--{text}")
    try:
        return {name: configs.build_plugin(plugins, "analyzer", table, name) for name, table in tables.items()}
    except UserError as error:
        raise UserError(f"--option {error}") from None


def allocation(fit: scaling.Fit, flops: float) -> dict[str, Any]:
    """How the law spends a budget: params, tokens and loss, each with its 95% interval."""
    best = fit.law.allocate(flops)
    intervals = {name: fit.interval(lambda law, name=name: getattr(law.allocate(flops), name)) for name in best._fields}
    return scaling.plain({"flops": flops, **best._asdict(), "intervals": {k: v for k, v in intervals.items() if v}})


def write_figures(a: argparse.Namespace, chosen: dict, fits: dict, runs: Runs, flops: float | None) -> None:
    """The PNGs and the page that --figures and --report ask for."""
    if not (a.figures or a.report):
        return
    fitted = {name: fit for name, fit in fits.items() if isinstance(fit, scaling.Fit)}
    figures = {
        name: report.figure(lambda figure, name=name, fit=fit: chosen[name].draw(figure, runs, fit))
        for name, fit in fitted.items()
        if hasattr(chosen[name], "draw")
    }
    if flops and fitted:
        figures["compare"] = report.comparison_figure(fitted, runs, flops)
    if a.figures:
        for name, png in figures.items():
            write(Path(a.figures) / f"{name}.png", png)
    if a.report:
        write(a.report, report.page(runs, fits, figures, flops))


# budget: from a compute budget to a run.


def add_budget(commands) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "budget",
        help="from a compute budget to a config that runs",
        description="Say the budget as --flops, as --params, as --gpu-hours, or as --gpus and --hours.",
    )
    command.add_argument("--flops", type=positive, help="FLOP of training, as 5.76e23")
    command.add_argument("--params", type=positive, help="the budget for which so many parameters are best, as 7e9")
    command.add_argument("--gpu-hours", type=positive, help="hours of one GPU, or of all together")
    command.add_argument("--hours", type=positive, help="of --gpus")
    command.add_argument("--gpus", type=at_least(1), help="how many; with it a layout is looked for")
    command.add_argument("--gpu", help=f"which accelerator (default, where one is needed: {GPU})")
    command.add_argument("--accelerators", metavar="FILE", help="a TOML file with more accelerators")
    command.add_argument("--mfu", type=positive, help=f"part of the peak (default: the layout's, or {proposal.MFU})")
    names = ", ".join(PUBLISHED)
    command.add_argument("--law", default="besiroglu", help=f"{names}, or what plan.py fit --out wrote (default: besiroglu)")
    command.add_argument("--tokens-available", type=positive, default=math.inf, help="different ones, which may repeat")
    command.add_argument("--inference-tokens", type=positive, default=0.0, help="that the model will be used on")
    command.add_argument("--family", default="llama", help="of the model (default: llama)")
    command.add_argument("--vocab-size", type=at_least(1), default=0, help="tokens (default: by the model's size)")
    command.add_argument("--seq-len", type=at_least(1), default=0, help="tokens of a row (default: by the model's size)")
    command.add_argument("--rule", default="deepseek", help=f"of batch and rate: {', '.join(recipe.RULES)} (default: deepseek)")
    command.add_argument("--corpus", default="stdlib", help="data.corpus of the config (default: stdlib)")
    command.add_argument("--plugins", action="append", default=[], metavar="PATH", help="a file or folder of plugins")
    command.add_argument("--out", metavar="FILE.toml", help="write the config that train.py takes")
    command.set_defaults(run=run_budget)
    return command


def run_budget(a: argparse.Namespace) -> tuple[dict, str]:
    plugins = load_plugins(a.plugins, where="--plugins")
    fit = scaling.read_law(a.law, plugins)
    for flag, word, known in (("--family", a.family, plugins.offers("model")), ("--rule", a.rule, recipe.RULES)):
        if word not in known:
            raise UserError(f"{flag} {word}: there is none of this name; {nearest(word, list(known))}")
    if 0 < a.vocab_size < shape.BYTES:
        raise UserError(f"--vocab-size {a.vocab_size}: must be at least {shape.BYTES}, the bytes and the special tokens.")
    flops, flops_are, machine = spend(a, fit)
    sized = budget.size(fit, flops, a.inference_tokens, a.tokens_available)
    made = proposal.propose(
        flops_are, fit, sized, plugins, machine, a.family, a.rule, a.seq_len, a.vocab_size, a.corpus, a.plugins
    )
    if a.out:
        write(a.out, made.to_toml())
    hint = f"{launcher(a.gpus or 1, machine)} train.py {a.out}" if a.out else "--out FILE.toml writes the config"
    return made.to_dict(), f"{proposal.text(made)}\n\n{hint}"


def launcher(gpus: int, machine: proposal.Machine | None) -> str:
    """What starts a process on each GPU, to be typed on every node: the fewest nodes that share them out evenly."""
    if gpus == 1:
        return "python"
    nodes = next(n for n in range(-(-gpus // machine.accelerator.node_gpus), gpus + 1) if gpus % n == 0)
    several = f" --nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500" if nodes > 1 else ""
    return f"torchrun{several} --nproc-per-node={gpus // nodes}"


GPU = "h100"


def spend(a: argparse.Namespace, fit: scaling.Fit) -> tuple[float, str, proposal.Machine | None]:
    """(FLOPs, how they came about, the accelerators) of the flags."""
    ways = "--flops, --params, --gpu-hours, or --gpus with --hours"
    given = [f"--{flag.replace('_', '-')}" for flag in ("flops", "params", "gpu_hours", "hours") if getattr(a, flag)]
    if not given:
        raise UserError(f"no budget; say one of {ways}.")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: each is a budget; say only one of {ways}.")
    if a.hours and not a.gpus:
        raise UserError("--hours: of how many GPUs? Say --gpus too, or --gpu-hours instead.")
    if a.mfu and a.mfu > 1:
        raise UserError(f"--mfu {a.mfu:g}: must be at most 1, a part of the peak.")
    machine = None
    if a.gpu or a.gpus or a.gpu_hours or a.mfu or a.accelerators:
        hours = a.gpu_hours or (a.gpus or 0) * (a.hours or 0)
        name = a.gpu or GPU
        machine = proposal.Machine(name, accelerators.accelerator(name, a.accelerators), a.gpus or 0, a.mfu or 0.0, hours)
    if a.flops:
        return a.flops, f"{a.flops:.3g} FLOP", machine
    if a.params:
        flops = budget.flops_for(fit.law, a.params)
        return flops, f"{flops:.3g} FLOP, for which {budget.short(a.params)} parameters are best", machine
    peak, mfu = machine.accelerator.peak_flops, a.mfu or proposal.MFU
    flops = machine.budget_hours * 3600 * peak * mfu
    hours = f"{a.gpus:,} x {a.hours:,g} hours" if a.hours else f"{a.gpu_hours:,g} hours"
    source = "as said" if a.mfu else "an assumption"
    return flops, f"{flops:.3g} FLOP: {hours} of {machine.gpu} x {peak:.3g} FLOP/s x an MFU of {mfu:.2f}, {source}", machine


# sweep, lr, batch and upscale: small runs, and from them to the big one.


def add_sweep(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("sweep", help="small runs within a budget: designed, run, fitted")
    add_config(command)
    command.add_argument("--budget", type=positive, required=True, help="FLOPs (6 N D) of all the runs together")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the sweep lives")
    command.add_argument("--approach", choices=("envelope", "isoflop", "parametric"), default="isoflop", help="to serve")
    command.add_argument("--sizes", type=at_least(2), default=6, help="models at each budget (default: 6)")
    command.add_argument("--budgets", type=at_least(2), default=3, help="how many, geometric (default: 3)")
    command.add_argument("--span", type=at_least(1.1), default=10.0, help="the largest budget by the smallest (default: 10)")
    command.add_argument("--size-ratio", type=at_least(1.1), default=2.0, help="of a size to the next smaller (default: 2)")
    command.add_argument(
        "--tokens-per-param", type=positive, default=20.0, help="of the models that sizes lie around (default: 20)"
    )
    command.add_argument("--run", action="store_true", dest="start", help="run what is not done yet, then fit and predict")
    command.add_argument("--jobs", type=at_least(1), default=1, help="sizes that run at a time (default: 1)")
    command.add_argument(
        "--launch", default=f"{sys.executable} {{train}} {{config}}", help="as 'torchrun --nproc-per-node=2 {train} {config}'"
    )
    command.add_argument("--target", type=positive, help="FLOPs to predict for (default: 10 times the largest budget)")
    command.set_defaults(run=run_sweep)
    return command


def run_sweep(a: argparse.Namespace) -> tuple[dict, str]:
    config, plugins = configs.load(a.config, a.overrides, checkpoint.read_config)
    runner = sweep.Runner(a.out, HERE / "train.py", a.launch, a.jobs)
    if hasattr(config.objective, "columns"):
        raise UserError(
            f"{a.config}: objective {config.objective._plugin_name} learns from examples; a sweep takes running text."
        )
    corpus = corpora.prepare(config, plugins)
    if not corpus.val.n_tokens:
        raise UserError(
            f"{a.config}: data.val_fraction = 0 leaves nothing to measure the runs on; raise it or set data.val_corpus."
        )
    decay = config.schedule.decay_fraction
    rungs = sweep.ladder(a.approach, a.budget, a.sizes, a.budgets, a.span, a.size_ratio, a.tokens_per_param, decay)
    plan = sweep.design(config, rungs, corpus, a.out)
    sweep.write(plan, a.out)
    if a.start:
        runner.run(plan)
    points = sweep.collect(plan, a.out)
    result, text = {"flops": plan.flops, "points": points}, sweep.table(plan, points)
    if a.start:
        target = [] if a.target is None else [f"--flops={a.target}"]
        compare = ["compare", str(a.out / "points.csv"), f"--report={a.out / 'report.html'}", *target]
        result["compare"], compared = run_compare(command_line().parse_args(compare))
        text += f"\n\n{compared}\n\nFigures are in {a.out / 'report.html'}."
    return result, text


def add_lr(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("lr", help="which learning rate a training bears: a range test")
    add_config(command)
    command.add_argument("--low", type=positive, default=1e-5, help="the first rate (default: 1e-5)")
    command.add_argument("--high", type=positive, default=1.0, help="the last rate (default: 1)")
    command.add_argument("--steps", type=at_least(20), default=300, help="from one to the other (default: 300)")
    command.add_argument("--figure", metavar="FILE.png", help="write the curve")
    command.set_defaults(run=run_lr)
    return command


def run_lr(a: argparse.Namespace) -> tuple[dict, str]:
    if a.low >= a.high:
        raise UserError(f"--low {a.low:g}: must be below --high {a.high:g}.")
    test = trial.range_test(*configs.load(a.config, a.overrides, checkpoint.read_config), a.low, a.high, a.steps)
    if a.figure:
        write(a.figure, report.figure(test.draw, (7, 4.2)))
    result = {"biggest": test.biggest, "recommended": test.recommended, "rates": test.rates, "losses": test.losses}
    return scaling.plain(result), test.text()


def add_batch(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("batch", help="the largest and the fastest micro-batch on this machine")
    add_config(command)
    command.add_argument("--up-to", type=at_least(1), help="rows (default: train.batch_size)")
    command.add_argument("--steps", type=at_least(1), default=3, help="that are timed, after a first one (default: 3)")
    command.add_argument(
        "--memory", type=positive, help="GiB that a CPU's process may take (default: half of what is free)"
    )
    command.set_defaults(run=run_batch)
    return command


def run_batch(a: argparse.Namespace) -> tuple[dict, str]:
    config, _ = configs.load(a.config, a.overrides, checkpoint.read_config)
    table = configs.to_dict(config)
    table["train"]["device"] = device = machine.choose_device(config.train.device).type
    limit = trial.free_memory() / 2 if a.memory is None else a.memory * 2**30
    up_to = a.up_to or config.train.batch_size
    tried = trial.largest_batch(lambda rows: trial.measure_batch(table, rows, a.steps, limit), up_to)
    result = {"device": device, "tried": [vars(m) for m in tried]}
    return result, trial.batch_text(tried, up_to, limit if device == "cpu" else None)


def add_upscale(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("upscale", help="from the best of many small runs to the big one, by muP")
    command.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders that hold such")
    command.add_argument("--params", type=positive, required=True, help="of the big model, embeddings included")
    command.add_argument("--tokens", type=positive, required=True, help="that it is trained on")
    command.add_argument("--out", metavar="FILE.toml", required=True, help="its config, which train.py accepts")
    command.set_defaults(run=run_upscale)
    return command


def run_upscale(a: argparse.Namespace) -> tuple[dict, str]:
    if not 6 * a.params * a.tokens <= budget.MOST:
        raise UserError(f"--tokens {a.tokens:g}: must be at most {budget.MOST / (6 * a.params):.3g} for that many parameters.")
    best = upscale.best(a.runs)
    table, text = upscale.upscaled(best, a.params, a.tokens, Path(a.out).stem)
    write(a.out, tomli_w.dumps(table))
    return {
        "from": str(best.folder),
        "loss": best.loss,
        "config": table,
    }, f"{text}\n{a.out} is written: python train.py {a.out}"


def write(path: str | Path, content: str | bytes) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}).") from None


# memory, layout, schedule: a config on accelerators.


def add_gpus(command: argparse.ArgumentParser) -> None:
    """What `memory` and `layout` both take."""
    add_config(command)
    command.add_argument("--gpu", required=True, help="which accelerator, as h100")
    command.add_argument("--gpus", type=at_least(1), default=1, help="how many (default: 1)")
    command.add_argument("--accelerators", metavar="FILE", help="a TOML file with more accelerators")


def read_config(a: argparse.Namespace) -> tuple:
    """(config, plugins, accelerator) of the flags."""
    accelerator = accelerators.accelerator(a.gpu, a.accelerators)
    return *configs.load(a.config, a.overrides, checkpoint.read_config), accelerator


def add_memory(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("memory", help="what each GPU holds in a step, item by item")
    add_gpus(command)
    command.add_argument(
        "--state-bits", type=at_least(1), metavar="BITS", help="of each of two moments, in place of the optimizer's own"
    )
    command.set_defaults(run=run_memory)
    return command


def run_memory(a: argparse.Namespace) -> tuple[dict, str]:
    config, plugins, accelerator = read_config(a)
    (n_vocab, source), example, model = preview.vocabulary(config), preview.example(config), preview.shape(config)
    layout = parallel.plan(config, plugins, World(0, 0, a.gpus, torch.device("cpu")), model)
    weights = None
    if a.state_bits:
        sizes = layout.sizes
        weights = memory.Weights(model, sizes["tensor"], sizes["shard"], lambda kind, n: 2 * a.state_bits / 8 * n)
    products = 4 if config.train.precision == "float32" else 2
    stages = memory.estimate(config, layout, model, example, "cuda", products, weights)
    n = cost.parameters(model.config)["total"]
    result = {
        "gpu": a.gpu, "memory_bytes": accelerator.memory_bytes, "layout": str(layout), "parameters": n, "vocab_size": n_vocab,
        "vocab_from": source, "fits": all(stage.peak <= accelerator.memory_bytes for stage in stages),
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }  # fmt: skip
    head = f"{n:,} parameters; vocabulary of {n_vocab:,} ({source}); {a.gpu}; {layout}"
    return result, f"{head}\n\n{memory.text(stages, accelerator.memory_bytes)}"


def add_layout(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("layout", help="which layout of the GPUs takes the least time a step")
    add_gpus(command)
    how = command.add_mutually_exclusive_group()
    how.add_argument(
        "--efficiency", type=float, default=layouts.EFFICIENCY,
        help=f"of the peak, that products reach while nothing is waited for (default: {layouts.EFFICIENCY})",
    )  # fmt: skip
    how.add_argument("--calibrate", metavar="RUN", type=Path, help="take it from a run on such GPUs")
    command.set_defaults(run=run_layout)
    return command


def run_layout(a: argparse.Namespace) -> tuple[dict, str]:
    config, plugins, accelerator = read_config(a)
    if not 0 < a.efficiency <= 1:
        raise UserError(f"--efficiency {a.efficiency:g}: it must be above 0 and at most 1.")
    efficiency = calibrated(a.calibrate, accelerator) if a.calibrate else a.efficiency
    found = layouts.search(config, plugins, accelerator, a.gpus, efficiency)
    result = {"gpu": a.gpu, "gpus": a.gpus, "efficiency": efficiency, **dataclasses.asdict(found)}
    result["reasons"] = [{"reason": reason, "layouts": n} for reason, n in found.reasons()]
    return result, layouts.text(found, a.gpus, efficiency)


def calibrated(run: Path, accelerator: accelerators.Accelerator) -> float:
    """The efficiency of a run. How many GPUs it had follows from its MFU; without one, on a CPU, it was one process."""
    config, plugins = configs.load(run / "config.toml")
    seconds, mfu = measured_seconds(run)
    flops = config.train.batch_size * cost.flops(preview.shape(config).config, preview.example(config))
    gpus = max(1, round(flops / seconds / mfu / accelerator.peak_flops)) if mfu else 1
    return layouts.calibrate(config, plugins, accelerator, gpus, seconds, f"--calibrate {run}")


def add_schedule(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("schedule", help="draw a pipeline's timetable")
    command.add_argument("--stages", type=at_least(1), default=4, help="ranks of the pipeline (default: 4)")
    command.add_argument("--microbatches", type=at_least(1), default=8, help="default: 8")
    command.add_argument("--schedule", choices=timetable.SCHEDULES, default="1f1b", help="default: 1f1b")
    command.add_argument("--stages-per-rank", type=at_least(1), default=0, help="of a schedule that gives a rank several")
    command.add_argument("--png", metavar="FILE", help="draw it as a picture, too")
    command.set_defaults(run=run_schedule)
    return command


def run_schedule(a: argparse.Namespace) -> tuple[dict, str]:
    options = {"degree": a.stages, "microbatches": a.microbatches, "schedule": a.schedule, "stages_per_rank": a.stages_per_rank}
    n_layers = a.stages * max(2, a.stages_per_rank)
    table = {"model": {"n_layers": n_layers}, "train": {"batch_size": a.microbatches}, "parallel": {"pipeline": options}}
    config, plugins = configs.from_dict(table, "schedule")
    parallel.plan(config, plugins, World(0, 0, a.stages, torch.device("cpu")))
    v = config.parallel["pipeline"].stages
    times = timetable.simulate(timetable.actions(a.schedule, a.stages, a.microbatches, v))
    idle, held = timetable.bubble(times), timetable.held(times)
    result = {"schedule": a.schedule, "stages_per_rank": v, "bubble": idle, "held": held}
    result["ranks"] = [[{**slot.action._asdict(), "start": slot.start, "end": slot.end} for slot in slots] for slots in times]
    lines = [f"{a.schedule}: idle {100 * idle:.1f}%, holds {', '.join(map(str, held))}", "", timetable.draw(times)]
    if a.png:
        timetable.picture(times, a.png, lines[0])
    return result, "\n".join(lines)


if __name__ == "__main__":
    run_script("plan.py", main)
