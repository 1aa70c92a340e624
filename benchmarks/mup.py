"""Does the best learning rate stay where it is as a model gets wider? With muP it should, without it falls.

    python benchmarks/mup.py --corpus 'my/*.txt'
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nanopre import config as configs, optim  # noqa: E402
from nanopre.command_line import Parser, at_least, positive, run_script  # noqa: E402
from nanopre.planning import report  # noqa: E402
from nanopre.planning.trial import Trial  # noqa: E402

CONFIG = """
[model]
name = "llama"
n_layers = 2
[tokenizer]
name = "bytes"
[schedule]
name = "linear"
warmup_steps = 10
min_lr_ratio = 0.0
[train]
batch_size = 16
seq_len = 64
device = "cpu"
"""


def train(flags: list[str], steps: int) -> float:
    """The mean loss of the last tenth of the steps; inf where it is not finite."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(CONFIG)
        file.flush()
        config, plugins = configs.load(file.name, flags)
    trial = Trial(config, plugins)
    losses = [trial.step(i, optim.learning_rate_factor(config.schedule, i, steps))[0] for i in range(steps)]
    last = losses[-(steps // 10) :]
    return sum(last) / len(last) if all(map(math.isfinite, losses)) else math.inf


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", default="stdlib", help="a dataset, file or glob (default: stdlib)")
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--bases", nargs="+", type=at_least(1), default=[64, 256], help="mup_base_width of each comparison")
    parser.add_argument("--widths", nargs="+", type=at_least(1), default=[64, 128, 256])
    parser.add_argument("--rates", nargs="+", type=positive, default=[5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2])
    parser.add_argument("--steps", type=at_least(1), default=120)
    a = parser.parse_args(argv)
    losses: dict[str, dict[int, list[float]]] = {}
    for base in (0, *a.bases):
        name = f"muP from width {base}" if base else "standard"
        for width in a.widths:
            flags = [f"--model.d_model={width}", f"--model.n_heads={width // 32}", f"--model.mup_base_width={base}"]
            flags += [f"--data.corpus={a.corpus}", f"--optimizer.name={a.optimizer}"]
            row = [train([*flags, f"--optimizer.lr={rate}"], a.steps) for rate in a.rates]
            losses.setdefault(name, {})[width] = row
            best = a.rates[min(range(len(row)), key=row.__getitem__)]
            print(f"{name}, width {width}: best rate {best:g}; " + "  ".join(f"{x:.3f}" for x in row), flush=True)

    def draw(figure) -> None:
        for axes, (name, rows) in zip(figure.subplots(1, len(losses), sharey=True), losses.items(), strict=True):
            for width, row in rows.items():
                (line,) = axes.plot(a.rates, row, "o-", ms=4, label=f"width {width}")
                axes.plot(a.rates[row.index(min(row))], min(row), "*", ms=13, color=line.get_color(), mec="black", mew=0.6)
            axes.set(xscale="log", xlabel="optimizer.lr", title=f"{name}; stars: the best")
            axes.legend(frameon=False)
        figure.axes[0].set_ylabel(f"loss after {a.steps} steps")

    stem = ROOT / "benchmarks" / "results" / f"mup-{a.optimizer}-{datetime.date.today()}"
    stem.with_suffix(".png").write_bytes(report.figure(draw))
    record = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, **vars(a), "losses": losses}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_script("mup.py", main)
