"""From measured runs and a budget to the next run.

    python plan.py COMMAND --help        what a command takes; every command has --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from nanopre import (
    UserError,
    accelerators,
    checkpoint,
    config as configs,
    cost,
    layouts,
    memory,
    parallel,
    planning,
    timetable,
)
from nanopre.distributed import World


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")


def main(argv: list[str]) -> None:
    parser = Parser(prog="plan.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_memory, add_layout, add_schedule):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    a, rest = parser.parse_known_args(argv)
    if not hasattr(a, "overrides") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    a.overrides = rest
    result, text = a.run(a)
    print(json.dumps(result, indent=1) if a.json else text)


# memory, layout, schedule: a config on accelerators.


def at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


at_least_one.__name__ = "whole number"  # argparse: "invalid whole number value: 'x'"


def add_config(command: argparse.ArgumentParser) -> None:
    """What `memory` and `layout` both take."""
    command.add_argument("config", help="a TOML file as train.py takes it; --section.key=value sets a key of it")
    command.add_argument("--gpu", required=True, help="which accelerator, as h100")
    command.add_argument("--gpus", type=at_least_one, default=1, help="how many (default: 1)")
    command.add_argument("--accelerators", metavar="FILE", help="a TOML file with more accelerators")
    command.set_defaults(overrides=[])


def read_config(a: argparse.Namespace) -> tuple:
    """(config, plugins, accelerator) of the flags."""
    accelerator = accelerators.accelerator(a.gpu, a.accelerators)
    return *configs.load(a.config, a.overrides, checkpoint.read_config), accelerator


def add_memory(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("memory", help="what each GPU holds in a step, item by item", allow_abbrev=False)
    add_config(command)
    command.add_argument(
        "--state-bits", type=at_least_one, metavar="BITS", help="of each of two moments, in place of the optimizer's own"
    )
    command.set_defaults(run=run_memory)
    return command


def run_memory(a: argparse.Namespace) -> tuple[dict, str]:
    config, plugins, accelerator = read_config(a)
    (n_vocab, source), example, model = planning.vocabulary(config), planning.example(config), planning.shape(config)
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
    command = commands.add_parser("layout", help="which layout of the GPUs takes the least time a step", allow_abbrev=False)
    add_config(command)
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
    return result, layouts.text(found, accelerator, a.gpus, efficiency)


def calibrated(run: Path, accelerator: accelerators.Accelerator) -> float:
    """The efficiency of a run. How many GPUs it had follows from its MFU; without one, on a CPU, it was one process."""
    config, plugins = configs.load(run / "config.toml")
    seconds, mfu = planning.measured_seconds(run)
    flops = config.train.batch_size * cost.flops(planning.shape(config).config, planning.example(config))
    gpus = max(1, round(flops / seconds / mfu / accelerator.peak_flops)) if mfu else 1
    return layouts.calibrate(config, plugins, accelerator, gpus, seconds, f"--calibrate {run}")


def add_schedule(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("schedule", help="draw a pipeline's timetable", allow_abbrev=False)
    command.add_argument("--stages", type=at_least_one, default=4, help="ranks of the pipeline (default: 4)")
    command.add_argument("--microbatches", type=at_least_one, default=8, help="default: 8")
    command.add_argument("--schedule", default="1f1b", help=f"{', '.join(timetable.SCHEDULES)} (default: 1f1b)")
    command.add_argument("--stages-per-rank", type=at_least_one, default=0, help="of a schedule that gives a rank several")
    command.add_argument("--png", metavar="FILE", help="draw it as a picture, too")
    command.set_defaults(run=run_schedule)
    return command


def run_schedule(a: argparse.Namespace) -> tuple[dict, str]:
    options = {"degree": a.stages, "microbatches": a.microbatches, "schedule": a.schedule, "stages_per_rank": a.stages_per_rank}
    n_layers = a.stages * max(2, a.stages_per_rank)
    table = {"model": {"n_layers": n_layers}, "train": {"batch_size": a.microbatches}, "parallel": {"pipeline": options}}
    config, plugins = configs.from_dict(table, "plan.py schedule")
    parallel.plan(config, plugins, World(0, 0, a.stages, torch.device("cpu")))
    v = config.parallel["pipeline"].stages_per_rank
    times = timetable.simulate(timetable.actions(a.schedule, a.stages, a.microbatches, v))
    idle, held = timetable.bubble(times), timetable.held(times)
    result = {"schedule": a.schedule, "stages_per_rank": v, "bubble": idle, "held": held}
    result["ranks"] = [[{**slot.action._asdict(), "start": slot.start, "end": slot.end} for slot in slots] for slots in times]
    lines = [f"{a.schedule}: idle {100 * idle:.1f}%, holds {', '.join(map(str, held))}", "", timetable.draw(times)]
    if a.png:
        timetable.picture(times, a.png, lines[0])
    return result, "\n".join(lines)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
