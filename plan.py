"""From measured runs and a budget to the next run.

python plan.py COMMAND --help        what a command takes; every command has --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from nanopre import UserError, config as configs, corpus as corpora, sweep

HERE = Path(__file__).parent


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one sentence."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")


def main(argv: list[str]) -> None:
    parser = Parser(prog="plan.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (add_sweep,):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    a = parser.parse_args(argv)
    result, text = a.run(a)
    print(json.dumps(result, indent=1) if a.json else text)


# ---------------------------------------------------------------------------------------------------------------------
# sweep


def add_sweep(commands) -> argparse.ArgumentParser:
    command = commands.add_parser("sweep", help="small runs within a budget: designed, run, fitted", allow_abbrev=False)
    command.add_argument("config", help="a TOML file: what all runs have in common, and the learning rate of its width")
    command.add_argument("--budget", type=positive, required=True, help="FLOPs (6 N D) of all the runs together")
    command.add_argument("--out", type=Path, required=True, help="the sweep's folder")
    command.add_argument("--approach", choices=("envelope", "isoflop", "parametric"), default="isoflop")
    command.add_argument("--sizes", type=whole(2), default=6, help="models at each budget")
    command.add_argument("--budgets", type=whole(2), default=3, help="how many, geometric")
    command.add_argument("--span", type=above_one, default=10.0, help="the largest budget by the smallest")
    command.add_argument("--size-ratio", type=above_one, default=2.0, help="parameters of one size by the next smaller's")
    command.add_argument("--tokens-per-param", type=positive, default=20.0, help="of the best model: the sizes lie around it")
    command.add_argument("--run", action="store_true", dest="start", help="run what is not done yet, then fit")
    command.add_argument("--jobs", type=whole(1), default=1, help="sizes that run at a time")
    default = f"{sys.executable} {{train}} {{config}}"
    command.add_argument("--launch", default=default, help="as 'torchrun --nproc-per-node=2 {train} {config}'")
    command.set_defaults(run=run_sweep)
    return command


def run_sweep(a: argparse.Namespace) -> tuple[dict, str]:
    config, plugins = configs.load(a.config)
    runner = sweep.Runner(a.out, HERE / "train.py", a.launch, a.jobs, lambda text: print(text, file=sys.stderr, flush=True))
    corpus = corpora.prepare(config, plugins)
    if not corpus.val.n_tokens:
        raise UserError(
            f"{a.config}: data.val_fraction = 0 leaves nothing to measure the runs on; raise it or set data.val_corpus."
        )
    base = configs.to_dict(config)
    decay = base["schedule"]["decay_fraction"]
    rungs = sweep.ladder(a.approach, a.budget, a.sizes, a.budgets, a.span, a.size_ratio, a.tokens_per_param, decay)
    plan = sweep.design(config, rungs, corpus, a.out)
    sweep.write(plan, a.out)
    if a.start:
        runner.run(plan)
    points = sweep.collect(plan, a.out)
    return {"flops": plan.flops, "points": points}, sweep.table(plan, points)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers on the command line


def positive(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def above_one(text: str) -> float:
    if not 1 < (number := float(text)) < float("inf"):
        raise ValueError
    return number


def whole(least: int):
    """The type of a whole number from `least` on."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise ValueError
        return value

    number.__name__ = f"whole number (at least {least})"
    return number


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
