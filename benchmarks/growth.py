"""How the cost of a step grows, ours beside nanoGPT's as it is shipped, on a CPU: a picture, and its figures.

    python benchmarks/growth.py --nanogpt PATH

With the length of a sequence from 64 to 4,096 at 4,096 tokens a step, and with the width of the model from 128 to 1,024, in
turns, as in benchmarks/cpu.py: the time of a step, and the peak memory of the process. Written to
benchmarks/results/growth-DATE.json and .png; needs matplotlib (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from cpu import ROOT, Row, commands
from turns import about, alternate, checkout, save

from nanopre.command_line import Parser, at_least, run_script

LENGTHS = {t: Row(f"{t} tokens", 256, 4, 4, 384, t, 4096 // t, 1, (0, 0)) for t in (64, 256, 1024, 4096)}
WIDTHS = {d: Row(f"{d} wide", d, 4, d // 64, 384, 256, 4, 1, (0, 0)) for d in (128, 256, 512, 1024)}
TINY = {t: Row(f"{t} tokens", 32, 1, 1, 384, t, 64 // t, 1, (0, 0)) for t in (32, 64)}
PROGRAMS = {"shipped": "nanoGPT", "ours": "nanopre"}


def measure(rows: dict[int, Row], nanogpt: Path | None, turns: int, threads: int) -> dict[str, dict[int, dict]]:
    """{program: {length or width: {"seconds" a step, "memory" in bytes}}}"""
    found: dict[str, dict[int, dict]] = {name: {} for name in PROGRAMS}
    for size, row in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            started = commands("growth", row, nanogpt, Path(folder))
            programs = alternate({n: c for n, c in started.items() if n in PROGRAMS}, row.steps, turns, Path(folder), threads)
        for name, program in programs.items():
            found[name][size] = {"seconds": median(program["seconds"]), "memory": program["memory"]}
            print(f"{row.title:12} {PROGRAMS[name]:8} {found[name][size]['seconds'] * 1e3:8.0f} ms a step, "
                  f"{program['memory'] / 1e9:.2f} GB", flush=True)  # fmt: skip
    return {name: sizes for name, sizes in found.items() if sizes}


def draw(result: dict, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for column, (by, label) in enumerate((("length", "tokens of a sequence"), ("width", "d_model"))):
        for row, (key, unit, title) in enumerate((("seconds", 1, "seconds a step"), ("memory", 1e9, "peak memory, GB"))):
            ax = axes[row, column]
            for name, sizes in result[by].items():
                ax.plot(list(sizes), [size[key] / unit for size in sizes.values()], marker="o", label=PROGRAMS[name])
            ax.set(xscale="log", yscale="log", xlabel=label, ylabel=title)
            ax.set_xticks(list(next(iter(result[by].values()))), labels=[f"{s:,}" for s in next(iter(result[by].values()))])
            ax.minorticks_off()
            ax.legend()
    figure.savefig(file, dpi=120)


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=checkout, help="a checkout of karpathy/nanoGPT; without it ours alone is drawn")
    parser.add_argument("--turns", type=at_least(1), default=3, help="of a step each (default: 3)")
    parser.add_argument("--threads", type=at_least(1), default=2, help="of each program (default: 2)")
    parser.add_argument("--shapes", choices=("full", "tiny"), default="full", help="tiny: a test of the script itself")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of the files")
    a = parser.parse_args(argv)
    tables = {"length": LENGTHS, "width": WIDTHS} if a.shapes == "full" else {"length": TINY, "width": TINY}
    result = about(a.threads)
    for by, rows in tables.items():
        result[by] = measure(rows, a.nanogpt, a.turns, a.threads)
    file = save(result, a.out, "growth", a.shapes)
    draw(result, file.with_suffix(".png"))
    print(f"written: {file} and .png")


if __name__ == "__main__":
    run_script("growth.py", main)
