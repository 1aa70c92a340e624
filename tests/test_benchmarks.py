"""The benchmarks that take turns: that the turns are taken, and that the scripts do what they say, at tiny shapes.

What they measure is no matter of tests. Peers are checked where they are here.
"""

from __future__ import annotations

import json
import os
import sys

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import turns  # noqa: E402

PROGRAM = """
import sys, time
from turns import Turns
turns = Turns()
while True:
    print("a step of its own")
    time.sleep(float(sys.argv[1]))
    turns.tick()
"""


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return file


def test_programs_take_turns_and_end(program, tmp_path):
    found = turns.alternate({"slow": [program, "0.06"], "fast": [program, "0.02"]}, 5, 3, tmp_path, threads=1)
    assert [len(found[name]["seconds"]) for name in ("slow", "fast")] == [3, 3]
    # A sleep takes at least its time, and a step that is told to take 60 ms is not counted as one of another program.
    assert min(found["slow"]["seconds"]) >= 0.06 and min(found["fast"]["seconds"]) >= 0.02
    assert found["slow"]["memory"] > 2**20 and found["slow"]["startup"] > 0.06


def test_a_ratio_is_the_median_of_the_turns_own_ratios():
    slower, faster = {"seconds": [2.0, 30.0, 4.0]}, {"seconds": [1.0, 10.0, 4.0]}
    assert turns.ratio(slower, faster) == 2.0  # of 2, 3 and 1; the medians' ratio would be 1


def test_a_program_that_ends_by_itself_is_named_with_what_it_said(program, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)program.py nonsense ended:.*could not convert string to float"):
        turns.alternate({"broken": [program, "nonsense"]}, 1, 1, tmp_path, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["char", "decode"])
def test_our_part_of_the_cpu_benchmark(row, tmp_path):
    if row == "decode":
        pytest.importorskip("transformers", reason="the peer of decoding is not installed")
    options = ["--shapes", "tiny", "--only", row, "--threads", "1", "--out", tmp_path]
    result = run_script(ROOT / "benchmarks/cpu.py", *options, timeout=300)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("cpu-*.json")
    found = json.loads(file.read_text())
    programs = found["rows"][row]["programs"]
    assert {"ours", "repeat"} <= set(programs) and found["versions"]["torch"] and found["threads"] == 1
    for program in programs.values():
        assert len(program["seconds"]) == 2 and program["memory"] > 2**26 and program["tokens_per_second"] > 0
    assert found["rows"][row]["ratios"]["repeat"] > 0


@pytest.mark.slow
@pytest.mark.skipif("NANOGPT" not in os.environ, reason="NANOGPT names no checkout of karpathy/nanoGPT")
@pytest.mark.parametrize("script", [["cpu.py", "--threads", "1"], ["gpu.py", "--device", "cpu"]])
def test_whole_tables_at_tiny_shapes(script, tmp_path):
    name, *options = script
    command = [ROOT / "benchmarks" / name, "--shapes", "tiny", "--nanogpt", os.environ["NANOGPT"], "--out", tmp_path, *options]
    result = run_script(*command, timeout=600)
    assert result.returncode == 0, result.stderr
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    alone = {"350m", "774m", "1.5b", "llama-1b", "bert", "t5"} if name == "gpu.py" else set()
    assert len(rows) == (8 if name == "gpu.py" else 6)
    for row, found in rows.items():
        assert "ours" in found["programs"] and (len(found["programs"]) == 1) == (row in alone)


@pytest.mark.parametrize("script", ["cpu.py", "gpu.py", "growth.py", "nanogpt.py"])
def test_a_folder_that_is_no_checkout_is_refused(script, tmp_path):
    result = run_script(ROOT / "benchmarks" / script, "--nanogpt", tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        f"{script}: argument --nanogpt: {tmp_path} is no checkout of karpathy/nanoGPT: it has no train.py; see --help.\n"
    )


def test_nanogpt_is_tuned_where_it_can_be_and_a_changed_one_is_refused(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    from nanogpt_worker import TUNED, prepare

    checkout = tmp_path / "nanoGPT"
    (checkout / "data").mkdir(parents=True)
    for name, before, _ in TUNED:
        (checkout / name).write_text(f"# before\n{before}x\n")
    shipped, tuned = (prepare(checkout, tmp_path / str(t), vocab_size=65, tuned=t) for t in (False, True))
    for name, before, after in TUNED:
        assert (shipped / name).read_text() == f"# before\n{before}x\n"
        assert (tuned / name).read_text() == f"# before\n{after}x\n"
    assert (tuned / "data/random/train.bin").stat().st_size == 2_000_000
    (checkout / "model.py").write_text("something else")
    with pytest.raises(RuntimeError, match='model.py has no "use_fused'):
        prepare(checkout, tmp_path / "again", vocab_size=65, tuned=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetuning.py", "--init=runs/x"], "name the data of a task: --polarity FOLDER, or"),
        (["finetuning.py", "--init=runs/x", "--sick-test=file"], "--sick-train and --sick-test go together"),
        (["convergence.py", "--train=a", "--val=b", "--only=mlm"], '--only: no row\'s name has "mlm" in it; there are: MLM,'),
        (["convergence.py", "--train=a", "--val=b", "--seeds=0"], "argument --seeds: 0 must be at least 1; see --help."),
        (["memory.py", "--pear=2"], "--pear: not an option; did you mean --pairs?"),
        (["overheads.py", "--pear=2"], "--pear: not an option; choose from"),
    ],
)
def test_nothing_to_measure_is_said(arguments, message):
    script, *options = arguments
    result = run_script(ROOT / "benchmarks" / script, *options)
    assert result.returncode == 2 and message in result.stderr and not result.stdout
