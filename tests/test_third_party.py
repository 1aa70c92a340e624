"""Plugins from outside, used as their users would: a package that pip installs, and one file dropped in a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanopre import checkpoint

ROOT = Path(__file__).parent.parent

TINY = ["--model.d_model=16", "--model.n_layers=1", "--model.n_heads=2", "--train.steps=3", "--train.batch_size=4"]
TINY += ["--train.seq_len=32", "--train.samples=0", "--tokenizer.name=bytes"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"Document {i} of a small corpus.\n" * 20)
    return folder


def run_train(folder: Path, *arguments: str, path: Path | None = None) -> str:
    """The output of train.py, whose process finds installed packages in `path`, too."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    command = [sys.executable, ROOT / "train.py", *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def train(folder: Path, corpus: Path, *arguments: str, path: Path | None = None) -> tuple[Path, list[dict]]:
    """The run's folder and its log, after three steps of a tiny model."""
    places = [f"--data.corpus={corpus}/*.txt", f"--data.cache_dir={folder}/cache", f"--out_dir={folder}/runs"]
    run_train(folder, *TINY, *places, *arguments, path=path)
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir, [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def plugins_of(run_dir: Path) -> dict[str, str]:
    """The plugins' versions, as the run's last checkpoint has them."""
    (info,) = run_dir.glob("checkpoints/step_00000003/info.json")
    return json.loads(info.read_text())["plugins"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip installed tests/third_party_plugin into; from a copy, since a build writes beside it."""
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(Path(__file__).parent / "third_party_plugin", folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--target", folder / "target", folder / "source"], check=True, timeout=120)
    return folder / "target"


def test_an_installed_package_is_listed(installed, tmp_path):
    listing = run_train(tmp_path, "--list-plugins", path=installed)
    expected = "objective reversed_clm  (nanopre-reversed 0.3)\n    Predict each token from all tokens after it.\n"
    assert expected + "    loss_scale: float = 1.0\n" in listing
    assert "objective clm  (" in listing


def test_an_installed_package_trains(installed, corpus, tmp_path):
    options = ["--objective.name=reversed_clm", "--objective.loss_scale=1000"]
    run_dir, log = train(tmp_path, corpus, *options, path=installed)
    losses = [line["loss"] for line in log if "loss" in line]
    # Of the untrained model ln(vocabulary) = 5.9 or so, and the plugin's own option multiplies what is reported.
    assert len(losses) == 3 and 3000 < losses[0] < 9000
    assert plugins_of(run_dir)["nanopre-reversed 0.3"] == "0.3"


ONE_FILE = '''
from dataclasses import dataclass
from pathlib import Path

from nanopre import hookimpl


@dataclass
class Diary:
    """Note what happens in a file of its own."""

    word: str = "step"

    def note(self, run, text):
        with open(run.dir / "diary.txt", "a") as file:
            file.write(f"{text}\\n")

    @hookimpl
    def nanopre_run_start(self, run):
        self.note(run, f"start, {run.steps} steps, rank {run.rank} of {run.world_size}, {run.n_parameters} parameters")

    @hookimpl
    def nanopre_step_end(self, run, step, metrics):
        self.note(run, f"{self.word} {step} {sorted(metrics)}")

    @hookimpl
    def nanopre_evaluation_end(self, run, step, metrics):
        self.note(run, f"evaluation {step} {sorted(metrics)}")

    @hookimpl
    def nanopre_checkpoint_saved(self, run, step, path):
        self.note(run, f"checkpoint {step} {Path(path).relative_to(run.dir)} {(Path(path) / 'info.json').exists()}")

    @hookimpl
    def nanopre_run_end(self, run, status):
        self.note(run, status)


@hookimpl
def nanopre_loggers(register):
    register("diary", Diary)
'''


def test_one_file_in_a_folder_sees_the_whole_run(corpus, tmp_path, monkeypatch):
    (tmp_path / "dropped").mkdir()
    (tmp_path / "dropped" / "diary.py").write_text(ONE_FILE)
    options = ['--plugins=["dropped"]', "--loggers.diary.word=Step", "--train.eval_interval=2"]
    run_dir, _ = train(tmp_path, corpus, *options)
    start, *lines = (run_dir / "diary.txt").read_text().splitlines()
    assert re.fullmatch(r"start, 3 steps, rank 0 of 1, \d+ parameters", start)
    steps = "['epoch', 'grad_norm', 'loss', 'lr', 'seconds', 'skipped', 'tokens', 'tokens_per_second']"
    steps = steps.replace("['", "['bits_per_byte', '")
    assert [line for line in lines if not line.startswith("checkpoint")] == [
        f"Step 1 {steps}",
        f"Step 2 {steps}",
        "evaluation 2 ['bits_per_byte', 'loss']",
        f"Step 3 {steps}",
        "evaluation 3 ['bits_per_byte', 'loss']",
        "finished",
    ]
    assert "checkpoint 3 checkpoints/step_00000003 True" in lines
    assert re.fullmatch("[0-9a-f]{12}", plugins_of(run_dir)["dropped/diary.py"])
    monkeypatch.chdir(tmp_path)  # the config names the plugin by the path that it had on the command line
    assert checkpoint.open_run(run_dir).config.loggers["diary"].word == "Step"
