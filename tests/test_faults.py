"""What goes wrong with many processes: ranks that differ, hang or die, and saving that is interrupted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, read_log, run_script
from ranks import TIMEOUT, Ranks, meeting_point
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nanopre import UserError, checkpoint, config as configs, distributed, saving


def tiny_table(folder: str, **sections) -> dict:
    table = {
        "out_dir": f"{folder}/runs",
        "name": "run",
        "model": {"name": "llama", "n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "d_ff": 48},
        "data": {"corpus": f"{folder}/text.txt", "cache_dir": f"{folder}/cache", "val_fraction": 0.0},
        "tokenizer": {"name": "bytes"},
        "train": {"steps": 6, "batch_size": 4, "seq_len": 32, "samples": 0, "device": "cpu", "precision": "float32"},
        "loggers": {"jsonl": {}},
    }
    for name, section in sections.items():
        table[name] = {**table.get(name, {}), **section} if isinstance(section, dict) else section
    return table


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 200)
    return tmp_path


# Ranks that differ.


def run_with(folder: str, by_rank: list[dict]) -> None:
    import train

    sections = by_rank[int(os.environ["RANK"])]
    train.train(*configs.from_dict(tiny_table(folder, **sections), "test"))


@pytest.mark.parametrize(
    "sections, sentence",
    [
        ({"seed": 5}, "rank 1 differs from rank 0: config.seed is 5 instead of 1337."),
        ({"train": {"steps": 7}}, "rank 1 differs from rank 0: config.train.steps is 7 instead of 6."),
    ],
)
def test_a_rank_that_differs_stops_the_run_at_its_start(sections, sentence, folder, ranks):
    results = ranks.run(2, run_with, str(folder), [{}, sections])
    assert all(error and "SystemExit: 2" in error for _, _, error in results)
    assert "".join(output for _, output, _ in results).count(sentence) == 1
    assert not (folder / "runs").exists()


def run_where_rank_1_differs(folder: str, what: str) -> None:
    """A run whose ranks have the same config, but files in a folder of their own, and rank 1 other code if that is it."""
    import train

    rank, before = os.environ["RANK"], os.getcwd()
    version = "another" if what == "code" and rank == "1" else "the same"
    os.chdir(Path(folder) / rank)
    try:
        with mock.patch.object(train, "code_version", lambda: version):
            train.train(*configs.from_dict(tiny_table(".", plugins=["./own.py"]), "test"))
    finally:
        os.chdir(before)


@pytest.mark.parametrize(
    "what, sentence",
    [
        ("corpus", "rank 1 differs from rank 0: corpus is '[0-9a-f]+' instead of '[0-9a-f]+'."),
        ("plugins", "rank 1 differs from rank 0: plugins.own.py is '[0-9a-f]+' instead of '[0-9a-f]+'."),
        ("code", "rank 1 differs from rank 0: code is 'another' instead of 'the same'."),
    ],
)
def test_a_rank_that_has_another_corpus_plugin_or_code_stops_the_run_at_its_start(what, sentence, tmp_path, ranks):
    for rank in "01":
        (tmp_path / rank).mkdir()
        other = " And a dog." if rank == "1" else ""
        (tmp_path / rank / "text.txt").write_text("A cat sat on a mat. " * 200 + (other if what == "corpus" else ""))
        (tmp_path / rank / "own.py").write_text('"""Offers nothing."""' + ("#" + other if what == "plugins" else ""))
    results = ranks.run(2, run_where_rank_1_differs, str(tmp_path), what)
    assert all(error and "SystemExit: 2" in error for _, _, error in results)
    assert len(re.findall(sentence, "".join(output for _, output, _ in results))) == 1
    assert not list(tmp_path.glob("*/runs"))


def test_the_first_difference_of_two_tables_is_named():
    a, b = {"x": {"y": 1, "z": [2]}, "w": 1}, {"x": {"y": 1, "z": [3]}, "w": 2}
    assert distributed.difference(a, b) == "x.z is [2] instead of [3]"
    assert distributed.difference({"x": 1}, {}) == "x is 1 instead of None"


# Saving in the background.


def test_a_checkpoint_that_is_written_in_the_background_is_the_same(folder, ranks):
    (folder / "other").mkdir()
    (folder / "other" / "text.txt").write_bytes((folder / "text.txt").read_bytes())
    options = {"parallel": {"fsdp": {}}, "checkpoint": {"interval": 2, "keep_last": 9}}
    for name, background in ((".", False), ("other", True)):
        sections = {**options, "checkpoint": {**options["checkpoint"], "async_save": background}}
        for _, _, error in ranks.run(2, run_with, str(folder / name), [sections, sections]):
            assert error is None, error
    one, other = folder / "runs" / "run", folder / "other" / "runs" / "run"
    assert [path.name for path in checkpoint.find(one)] == [path.name for path in checkpoint.find(other)]
    assert len(checkpoint.find(one)) == 3 and checkpoint.pointed(other, "latest").name == "step_00000006"
    for a, b in zip(checkpoint.find(one), checkpoint.find(other), strict=True):
        ours, theirs = checkpoint.verify(a), checkpoint.verify(b)
        assert ours["progress"]["tokens"] == theirs["progress"]["tokens"] == ours["step"] * 4 * 32
        weights, theirs = checkpoint.open_run(a).model.state_dict(), checkpoint.open_run(b).model.state_dict()
        assert all(torch.equal(weights[name], theirs[name]) for name in weights)


# Ranks that die while they save.


def interrupted(folder: str) -> tuple[set, set]:
    """The numbers that load after a checkpoint of ones, and one of twos of which rank 1's part could not be written: saved in
    place, as torch does it, and as we do."""
    with distributed.start(torch.device("cpu")):
        mesh, part = init_device_mesh("cpu", (2,)), torch.nn.Linear(8, 8, bias=False)
        part.weight = torch.nn.Parameter(distribute_tensor(part.weight.detach(), mesh, [Shard(0)]))

        def fail(self, *arguments):
            raise OSError("No space left on device")

        def fill(number: float) -> dict:
            torch.nn.init.constant_(part.weight, number)
            return {"model": part.state_dict()}

        def found() -> set:
            return set(part.weight.full_tensor().flatten().tolist())

        in_place = Path(folder) / "in place"
        torch.distributed.checkpoint.save(fill(1.0), checkpoint_id=in_place)
        saving.save(Path(folder), 1, [part], [], {})
        state = fill(2.0)
        disk_is_full = mock.patch.object(FileSystemWriter, "write_data", fail) if os.environ["RANK"] == "1" else nullcontext()
        with disk_is_full:
            with pytest.raises(CheckpointException):
                torch.distributed.checkpoint.save(state, checkpoint_id=in_place)
            with pytest.raises(UserError, match="step_00000002.tmp: can't be written"):
                saving.save(Path(folder), 2, [part], [], {})
        state = fill(0.0)
        torch.distributed.checkpoint.load(state, checkpoint_id=in_place)
        theirs = found()
        _, latest = checkpoint.locate(folder)
        checkpoint.load(latest, [part])
        return theirs, found()


def test_a_checkpoint_saved_in_place_may_be_a_mixture_of_two_without_an_error_and_ours_is_not(tmp_path, ranks):
    (tmp_path / "config.toml").touch()
    for result, _, error in ranks.run(2, interrupted, str(tmp_path)):
        assert error is None, error
        in_place, ours = result
        assert in_place == {1.0, 2.0} and ours == {1.0}


def test_what_is_left_of_an_interrupted_save_is_removed_with_the_old_checkpoints(tmp_path):
    part = torch.nn.Linear(4, 4)
    saving.begin(tmp_path, 1, [part], [], {})  # and never finished
    for step in (2, 3, 4):
        saving.save(tmp_path, step, [part], [], {})
    saving.prune(tmp_path, 2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000003", "step_00000004"]


def save_for_ever(folder: str, rank: int, environment: dict[str, str], background: bool) -> None:
    """Save a model of 16 MB again and again, its numbers those of the step."""
    os.environ.update({**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    sys.stderr = open(os.devnull, "w")  # the rank that survives complains
    torch.set_num_threads(1)
    with distributed.start(torch.device("cpu")):
        part = torch.nn.Linear(2048, 2048, bias=False)
        for step in range(1, 10**6):
            torch.nn.init.constant_(part.weight, step)
            saving.begin(Path(folder), step, [part], [], {}, background).finish()
            if rank == 0:
                saving.prune(Path(folder), 2)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_whenever_a_rank_is_killed_there_is_a_whole_checkpoint(tmp_path, background):
    pool, draw, seen = Ranks(), random.Random(0), set()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.toml").touch()
    for _ in range(12):
        store, environment = meeting_point()
        arguments = [(str(tmp_path), rank, environment, background) for rank in (0, 1)]
        workers = [pool.context.Process(target=save_for_ever, args=a, daemon=True) for a in arguments]
        before = checkpoint.pointed(tmp_path, "latest")
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + TIMEOUT
        while checkpoint.pointed(tmp_path, "latest") in (None, before) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        draw.choice(workers).kill()
        time.sleep(0.05)
        for worker in workers:
            worker.kill()
            worker.join()
        _, latest = checkpoint.locate(tmp_path)
        info = checkpoint.verify(latest)
        part = torch.nn.Linear(2048, 2048, bias=False)
        checkpoint.load(latest, [part])
        assert (part.weight == info["step"]).all()  # not a mixture of two
        seen.add(info["step"])
        seen.update(["temporary"] if list(tmp_path.glob("checkpoints/*.tmp")) else [])
    assert "temporary" in seen  # some were killed in the middle


# Ranks that die or hang while they train.


def launch(*arguments, processes: int = 2, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += options.pop("torchrun", [])
    return subprocess.Popen(
        [*command, "train.py", *map(str, arguments)], cwd=ROOT, env={**ENVIRONMENT, **options}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen, seconds: float = TIMEOUT):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    if not found:
        process.terminate()  # which ends its ranks, too
        raise AssertionError(process.communicate()[1])
    return found


def workers_of(process: subprocess.Popen) -> list[int]:
    """The ranks that torchrun has started, the last one last."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes())


def config_file(folder: Path, **sections) -> Path:
    import tomli_w

    (folder / "config.toml").write_text(tomli_w.dumps(tiny_table(str(folder), **sections)))
    return folder / "config.toml"


linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")


@pytest.mark.slow
@linux
def test_torchrun_restarts_a_job_that_goes_on_where_it_was(folder):
    sections = {"train": {"steps": 300}, "checkpoint": {"interval": 20}}
    undisturbed = run_script("train.py", config_file(folder, **sections), "--name=whole", processes=2)
    assert undisturbed.returncode == 0, undisturbed.stderr
    process = launch(config_file(folder, **sections), torchrun=["--max-restarts=3"])
    run = folder / "runs" / "run"
    wait_for(lambda: checkpoint.pointed(run, "latest"), process)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert [path.name for path in sorted((folder / "runs").iterdir())] == ["run", "whole"]  # no second run
    theirs, ours = read_log(folder / "runs" / "whole")[0], read_log(run)[0]
    assert len(ours) >= 300 and ours[-1]["step"] == theirs[-1]["step"] == 300
    assert ours[-1]["loss"] == theirs[-1]["loss"]


@pytest.mark.slow
@linux
def test_a_rank_that_hangs_is_named(folder):
    process = launch(config_file(folder, train={"steps": 100000, "timeout": 15.0}))
    log = folder / "runs" / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    ranks = workers_of(process)
    (second,) = [pid for pid in ranks if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    os.kill(second, signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        for pid in ranks:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
    assert process.returncode != 0
    assert errors.count("rank 1 ended, or did not answer for 15 s (train.timeout): the run stops.") == 1
    assert 'train.py", line' not in errors


@pytest.mark.slow
@linux
def test_a_signal_to_all_ranks_saves_once_and_exits_0(folder):
    process = launch(config_file(folder, train={"steps": 100000}))
    log = folder / "runs" / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    for pid in workers_of(process):
        os.kill(pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    assert output.count("go on with: python train.py --resume") == 1
    (saved,) = checkpoint.find(folder / "runs" / "run")
    assert checkpoint.verify(saved)["step"] == read_log(folder / "runs" / "run")[0][-1]["step"]


@pytest.mark.slow
@linux
def test_ranks_whose_torchrun_is_killed_save_and_end(folder):
    process = launch(config_file(folder, train={"steps": 100000}))
    log = folder / "runs" / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    process.kill()
    output, _ = process.communicate(timeout=TIMEOUT)  # the ranks write to the same pipe, which ends with the last of them
    assert output.count("go on with: python train.py --resume") == 1
    (saved,) = checkpoint.find(folder / "runs" / "run")
    assert checkpoint.verify(saved)["step"] == read_log(folder / "runs" / "run")[0][-1]["step"]


@pytest.mark.slow
def test_tracing_hooks_does_not_stop_many_ranks(folder):
    result = run_script("train.py", config_file(folder), processes=2, env={**ENVIRONMENT, "NANOPRE_TRACE": "1"})
    assert result.returncode == 0, result.stderr
    assert "nanopre_step_end" in result.stdout + result.stderr
    assert len(json.loads((folder / "runs" / "run" / "log.jsonl").read_text().splitlines()[-1])) > 3


def test_bytes_that_were_lost_load_without_an_error_but_for_our_checksums(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.toml").touch()
    part = torch.nn.Linear(64, 64, bias=False)
    folder = saving.save(tmp_path, 1, [part], [], {})
    (file,) = folder.glob("*.distcp")
    data = bytearray(file.read_bytes())
    at = data.index(part.weight.detach().numpy().tobytes()[:64])
    data[at : at + 64] = bytes(64)
    file.write_bytes(data)
    state = {"model": {"weight": torch.empty(64, 64)}}
    torch.distributed.checkpoint.load(state, checkpoint_id=folder, no_dist=True)
    assert (state["model"]["weight"] != part.weight).any()  # nothing was said
    with pytest.raises(UserError, match="damaged .*the checksum differs"):
        checkpoint.load(folder, [part])
