"""Whole runs: what a user types, and the promises that the loop makes."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ENVIRONMENT, ROOT, read_log, run_script

import train
from nanopre import UserError, checkpoint, config as configs, corpus as corpora, distributed, saving
from nanopre.plugins import load_plugins
from nanopre.tokenizer import bytes_tokenizer, characters_tokenizer

# A signal between two steps ends the run after the second of them.
STOP_AT_5 = """
import os, signal
from nanopre import hookimpl

@hookimpl
def nanopre_step_end(run, step):
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
"""

# An objective whose loss is not a number in the steps that it is told, as often as it is told.
BROKEN = """
from dataclasses import dataclass, field
import importlib.util, pathlib, nanopre
from nanopre import hookimpl

file = pathlib.Path(nanopre.__file__).parent.parent / "plugins/objectives/clm.py"
spec = importlib.util.spec_from_file_location("clm_for_a_test", file)
clm = importlib.util.module_from_spec(spec)
import sys
sys.modules[spec.name] = clm
spec.loader.exec_module(clm)

@dataclass
class Broken(clm.CausalLM):
    '''Causal LM with a loss that is not a number in some calls.'''
    calls: list[int] = field(default_factory=list)

    def loss(self, head, h, batch):
        self.n = getattr(self, "n", -1) + 1
        sums = super().loss(head, h, batch)
        return {k: v * float("nan") if self.n in self.calls else v for k, v in sums.items()}

@hookimpl
def nanopre_objectives(register):
    register("broken", Broken)
"""


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.open_run(run_dir).model.state_dict()


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_log(run_dir)[0]]


def run(tiny: list[str], name: str, *overrides: str, tmp_path: Path) -> Path:
    train.main([*tiny, f"--name={name}", *overrides])
    return tmp_path / "runs" / name


def test_a_run_learns_logs_and_leaves_a_whole_folder(tiny, tmp_path, capsys):
    options = ["--train.steps=60", "--train.eval_interval=30", "--checkpoint.interval=10", "--train.samples=1"]
    folder = run(tiny, "a", *options, tmp_path=tmp_path)
    steps, evaluations = read_log(folder)
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert {"loss", "bits_per_byte", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds", "skipped", "epoch"} <= set(
        steps[0]
    )
    assert steps[-1]["tokens"] == 60 * 8 * 48
    # 366 equally likely tokens cost ln 366 = 5.9 nats; the text's letters are worth about 3.
    assert abs(steps[0]["loss"] - math.log(384)) < 0.3
    assert evaluations[-1]["val_loss"] < 3.2
    assert evaluations[-1]["val_bits_per_byte"] == pytest.approx(
        evaluations[-1]["val_loss"] / math.log(2), rel=0.01
    )  # a byte is a token here, but for the ends of documents
    kept = checkpoint.find(folder)
    assert [c.name for c in kept] == ["step_00000050", "step_00000060"]
    assert checkpoint.pointed(folder, "latest").name == "step_00000060"
    assert checkpoint.pointed(folder, "best").name == "step_00000060"
    info = checkpoint.verify(kept[-1])
    assert info["versions"]["torch"] == torch.__version__
    assert len(info["git_commit"]) in (0, 40)
    assert any(path.endswith("clm.py") for path in info["plugins"])
    assert info["config"]["train"]["steps"] == 60
    output = capsys.readouterr().out
    assert "validation loss" in output and "--- sample 1 ---" in output


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_is_bitwise(tiny, tmp_path, capsys, optimizer):
    # With dropout, so that the generators' state is proven too; SIGTERM stops the run after step 5.
    options = ["--model.dropout=0.1", f"--optimizer.name={optimizer}"]
    whole = run(tiny, "whole", *options, tmp_path=tmp_path)
    (tmp_path / "stop.py").write_text(STOP_AT_5)
    stopped = run(tiny, "stopped", *options, f'--plugins=["{tmp_path}/stop.py"]', tmp_path=tmp_path)
    output = capsys.readouterr().out
    assert f"Stopped after step 5 of 12; go on with: python train.py --resume {stopped}" in output
    assert losses(stopped) == losses(whole)[:5]
    train.main(["--resume", str(stopped)])
    assert losses(stopped) == losses(whole)
    assert read_log(stopped)[1] == read_log(whole)[1]
    for (name, a), b in zip(weights(whole).items(), weights(stopped).values(), strict=True):
        assert torch.equal(a, b), name
    # Its lines of a step that was logged after the checkpoint would be written anew, not twice.
    assert [line["step"] for line in read_log(stopped)[0]] == list(range(1, 13))


@pytest.mark.slow
def test_two_processes_and_micro_batches_change_nothing(tiny, tmp_path):
    """The same losses and gradient norms for 1 process, 2 processes, and both with accumulation; and a run that stopped
    on 1 process goes on on 2."""
    one = run(tiny, "one", tmp_path=tmp_path)
    micro = run(tiny, "micro", "--train.micro_batch_size=2", tmp_path=tmp_path)
    result = run_script("train.py", *tiny, "--name=two", "--train.micro_batch_size=2", processes=2)
    assert result.returncode == 0, result.stderr
    (tmp_path / "stop.py").write_text(STOP_AT_5)
    stopped = run(tiny, "stopped", f'--plugins=["{tmp_path}/stop.py"]', tmp_path=tmp_path)
    result = run_script("train.py", "--resume", stopped, processes=2)
    assert result.returncode == 0, result.stderr
    steps, evaluations = read_log(one)
    for other in (micro, tmp_path / "runs" / "two", stopped):
        other_steps, other_evaluations = read_log(other)
        for key in ("loss", "grad_norm"):
            expected = [line[key] for line in steps]
            assert [line[key] for line in other_steps] == pytest.approx(expected, rel=2e-5), (other, key)
        expected = [line["val_loss"] for line in evaluations]
        assert [line["val_loss"] for line in other_evaluations] == pytest.approx(expected, rel=2e-5), other


def test_evaluation_is_the_mean_over_the_whole_split(tiny, tmp_path):
    folder = run(tiny, "a", "--train.micro_batch_size=3", "--train.batch_size=9", tmp_path=tmp_path)
    opened = checkpoint.open_run(folder)
    corpus = corpora.prepare(opened.config, opened.registry, progress=False)
    tokens = torch.from_numpy(np.asarray(corpus.val.tokens).astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 48):  # each token but the first once, from a context of its own window
        window = tokens[start : start + 49]
        with torch.no_grad():
            logits = opened.model(window[None, :-1])
        total += torch.nn.functional.cross_entropy(logits[0], window[1:], reduction="sum").item()
    assert read_log(folder)[1][-1]["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)


def test_a_fixed_part_of_the_validation_split(tiny, tmp_path):
    # 100 tokens are 3 rows of 48; the part does not depend on the micro-batches that go through it.
    parts = [run(tiny, f"m{m}", "--train.eval_tokens=100", f"--train.micro_batch_size={m}", tmp_path=tmp_path) for m in (1, 8)]
    (a, b), whole = (read_log(part)[1] for part in parts), read_log(run(tiny, "all", tmp_path=tmp_path))[1]
    assert a[0]["val_loss"] == pytest.approx(b[0]["val_loss"], rel=1e-5)
    assert a[0]["val_loss"] != pytest.approx(whole[0]["val_loss"], rel=1e-5)


def test_steps_that_are_not_finite_are_skipped_and_counted(tiny, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    options = [f'--plugins=["{tmp_path}/broken.py"]', "--objective.name=broken", "--train.eval_interval=100"]
    folder = run(tiny, "a", *options, "--objective.calls=[3, 4]", "--train.max_skipped_steps=2", tmp_path=tmp_path)
    steps, _ = read_log(folder)
    assert [line["skipped"] for line in steps] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2]
    assert math.isnan(steps[3]["loss"]) and math.isfinite(steps[5]["loss"])
    assert all(w.isfinite().all() for w in weights(folder).values())


def test_too_many_skipped_steps_stop_the_run_and_leave_the_last_good_checkpoint(tiny, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    options = [f'--plugins=["{tmp_path}/broken.py"]', "--objective.name=broken", "--checkpoint.interval=4"]
    options += ["--objective.calls=[5, 6, 7, 8, 9, 10, 11]", "--train.max_skipped_steps=3", "--train.eval_interval=100"]
    with pytest.raises(UserError, match=r"not finite in 4 steps in a row, up to step 9; .*step_00000008"):
        run(tiny, "a", *options, tmp_path=tmp_path)
    assert all(w.isfinite().all() for w in weights(tmp_path / "runs" / "a").values())


def test_no_run_is_ever_overwritten(tiny, tmp_path):
    run(tiny, "a", tmp_path=tmp_path)
    before = (tmp_path / "runs" / "a" / "log.jsonl").read_bytes()
    run(tiny, "a", "--seed=2", tmp_path=tmp_path)
    assert (tmp_path / "runs" / "a" / "log.jsonl").read_bytes() == before
    assert losses(tmp_path / "runs" / "a-2") != losses(tmp_path / "runs" / "a")


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "missing", "no info"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(tiny, tmp_path, damage):
    folder = run(tiny, "a", "--checkpoint.interval=6", tmp_path=tmp_path)
    newest = folder / "checkpoints" / "step_00000012"
    victim = next(newest.glob("*.distcp")) if damage != "no info" else newest / "info.json"
    content = victim.read_bytes()
    if damage == "truncated":
        victim.write_bytes(content[:-100])
    elif damage == "zeroed":
        victim.write_bytes(content[:200] + bytes(64) + content[264:])
    else:
        victim.unlink()
    with pytest.raises(UserError) as error:
        checkpoint.open_run(folder)
    assert str(victim) in str(error.value)
    assert str(folder / "checkpoints" / "step_00000006") in str(error.value)
    checkpoint.open_run(folder / "checkpoints" / "step_00000006")


CHANGES = [
    ("step", lambda info: info.pop("step")),
    ("step", lambda info: info.update(step="12")),
    ("files", lambda info: info.update(files=[])),
    ("subscript", lambda info: info["files"].update({".metadata": 5})),
    ("specify", lambda info: info["files"].update({".metadata": {"bytes": "x"}})),
    ("corpus", lambda info: info.pop("corpus")),
    ("best_val_loss", lambda info: info.update(best_val_loss="low")),
    ("progress", lambda info: info.pop("progress")),
    ("skipped", lambda info: info["progress"].pop("skipped")),
    ("tokens", lambda info: info["progress"].update(tokens=None)),
]


def test_what_a_run_goes_on_with_is_checked(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    file = folder / "checkpoints" / "step_00000012" / "info.json"
    whole = file.read_text()
    changed = []
    for key, change in CHANGES:
        info = json.loads(whole)
        change(info)
        changed.append((key, json.dumps(info)))
    for key, content in [*changed, ("table", "[]"), ("table", "null"), ("recursion", "[" * 100_000), ("Expecting", "")]:
        file.write_text(content)
        with pytest.raises(UserError, match=f"step_00000012.info.json: .*damaged .*{key}.*; the checkpoint before it") as error:
            train.main(["--resume", str(folder), "--train.steps=13"])
        assert "\n" not in str(error.value)


def test_a_checkpoint_is_on_the_disk_before_latest_names_it(tiny, tmp_path, monkeypatch):
    folder = run(tiny, "a", tmp_path=tmp_path)
    opened, done = checkpoint.open_run(folder), []

    def note(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def noted(*paths):
            done.append((name, *(path.name for path in paths)))
            return original(*paths)

        monkeypatch.setattr(owner, name, noted)

    note(saving, "_sync")
    note(Path, "rename")
    note(os, "replace")
    saving.save(folder, 13, [opened.model], [], {})
    new = "step_00000013"
    assert done[-6:] == [
        ("_sync", "info.json", f"{new}.tmp"),
        ("rename", f"{new}.tmp", new),
        ("_sync", "checkpoints"),
        ("_sync", "latest.tmp"),
        ("replace", "latest.tmp", "latest"),
        ("_sync", "checkpoints"),
    ]


def test_what_a_resumed_run_changes_stays_changed(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    train.main(["--resume", str(folder), "--train.steps=18", "--optimizer.lr=1e-3"])
    config = configs.load(folder / "config.toml")[0]
    assert config.train.steps == 18 and config.optimizer.lr == 1e-3
    with pytest.raises(UserError, match="all 18 steps are done; go on with --train.steps=36"):
        train.main(["--resume", str(folder)])


@pytest.mark.parametrize(
    "flags, listed",
    [
        (["--train.batch_size=4"], "train.steps = 4 instead of 2, train.batch_size = 4 instead of 8: its steps see other rows"),
        (["--train.seq_len=24"], "train.steps = 4 instead of 2, train.seq_len = 24 instead of 48: its steps see other rows"),
        (["--seed=1"], "seed = 1 instead of 1337, train.steps = 4 instead of 2: its steps see other rows"),
        (["--objective.name=prefix_lm"], 'objective.name = "prefix_lm" instead of "clm", .*: its steps see other rows'),
        (["--model.dropout=0.1"], "model.dropout = 0.1 instead of 0.0, train.steps = 4 instead of 2."),
    ],
)
def test_what_a_resumed_run_changes_is_said_when_it_changes(tiny, tmp_path, capsys, flags, listed):
    folder = run(tiny, "a", "--train.steps=2", tmp_path=tmp_path)
    train.main(["--resume", str(folder), "--train.steps=4", "--print-config", *flags])
    assert "Resuming" not in capsys.readouterr().out
    train.main(["--resume", str(folder), "--train.steps=4", *flags])
    assert re.search(f"^Resuming with {listed}", capsys.readouterr().out, re.MULTILINE)
    train.main(["--resume", str(folder), "--train.steps=5"])
    assert re.search("^Resuming with train.steps = 5 instead of 4.$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "model, flag, sentence",
    [
        ("llama", "--model.n_heads=4", "model.n_heads can't be 4, since the weights were trained with 2"),
        ("llama", "--tokenizer.name=chars", 'tokenizer.name can\'t be "chars", since the weights were trained with "bytes"'),
        ("gpt2", "--train.seq_len=24", "train.seq_len can't be 24, since the weights were trained with 48"),
        ("llama", "--init_from=runs/x", "--init_from=runs/x: a run that is resumed has weights of its own"),
    ],
)
def test_what_the_weights_cannot_follow_is_not_resumed(tiny, tmp_path, model, flag, sentence):
    folder = run(tiny, "a", "--train.steps=1", f"--model.name={model}", tmp_path=tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        train.main(["--resume", str(folder), "--train.steps=2", flag])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer, option, value", [("adamw", "weight_decay", 0.5), ("muon", "momentum", 0.5)])
def test_an_optimizer_goes_on_with_the_options_that_are_asked_for(tiny, tmp_path, optimizer, option, value):
    folder = run(tiny, "a", "--train.steps=2", f"--optimizer.name={optimizer}", tmp_path=tmp_path)
    config = configs.load(folder / "config.toml", [f"--optimizer.{option}={value}"])[0]
    opened = checkpoint.open_run(folder)
    asked, resumed = (config.optimizer.build(opened.model) for _ in range(2))
    checkpoint.load(opened.checkpoint, [opened.model], resumed)
    for one, other in zip(asked, resumed, strict=True):
        assert other.state  # the moments have come from the checkpoint
        for a, b in zip(one.param_groups, other.param_groups, strict=True):
            assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    assert resumed[0].param_groups[0][option] == value


def test_a_resumed_run_is_the_run_that_it_was(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    for text in ("--name=b", "--out_dir=elsewhere"):
        with pytest.raises(UserError, match=f"{text}: a run that is resumed stays in its folder"):
            train.main(["--resume", str(folder), text])
    with pytest.raises(UserError, match="not a run's folder"):
        train.main(["--resume", ""])
    bytes_tokenizer().save(folder / "tokenizer.json")
    train.main(["--resume", str(folder), "--train.steps=13"])
    characters_tokenizer(["other letters"]).save(folder / "tokenizer.json")
    with pytest.raises(UserError, match="the corpus or tokenizer changed since the run began"):
        train.main(["--resume", str(folder), "--train.steps=14"])


def test_a_prompt_that_the_vocabulary_cannot_spell_is_refused_before_training(tiny, tmp_path):
    options = ["--tokenizer.name=chars", "--train.prompt=ß"]
    with pytest.raises(UserError, match="train.prompt: the character 'ß' .U.00DF. is not among the vocabulary's"):
        run(tiny, "a", *options, "--train.samples=1", tmp_path=tmp_path)
    assert not (tmp_path / "runs").exists()
    run(tiny, "a", *options, tmp_path=tmp_path)  # no samples: no prompt


def test_a_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="out_dir: the run's folder .*runs/a can't be made .Not a directory."):
        run(tiny, "a", tmp_path=tmp_path)


def test_a_run_that_cannot_be_written(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    (folder / "config.toml.tmp").mkdir()
    with pytest.raises(UserError, match="runs/a/config.toml: can't be written .Is a directory."):
        train.main(["--resume", str(folder), "--train.steps=13"])


def test_a_plugin_that_exits_ends_no_run_without_a_word(tiny, tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="leaves.py: this plugin failed to import .SystemExit: 0"):
        run(tiny, "a", f'--plugins=["{tmp_path}/leaves.py"]', tmp_path=tmp_path)


class Foreign:
    """What a stranger may pickle: whoever reads it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "module, name",
    [("posix", "mkdir"), ("torch.serialization", "os.mkdir"), ("torch.distributed.checkpoint.filesystem", "os.mkdir")],
)
def test_a_checkpoint_with_foreign_metadata_runs_nothing(module, name, tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    newest = folder / "checkpoints" / "step_00000012"
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name, str(tmp_path / "made"))]
    pickled = b"\x80\x04%b%b\x93%b\x85R." % tuple(words)  # protocol 4, whose names may have dots: module.name(folder)
    pickle.loads(pickled)
    (tmp_path / "made").rmdir()
    (newest / ".metadata").write_bytes(pickled)
    reseal(newest)
    with pytest.raises(UserError, match=f"^a checkpoint's .metadata names {module}.{name}, which no checkpoint needs"):
        checkpoint.open_run(folder)
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_with_a_foreign_value_runs_nothing(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    newest = folder / "checkpoints" / "step_00000012"
    weights = checkpoint.open_run(folder).model.state_dict()
    (newest / ".metadata").unlink()
    dcp.save({"model": weights | {"head.norm.weight": Foreign(tmp_path / "made")}}, checkpoint_id=newest, no_dist=True)
    reseal(newest)
    with pytest.raises(UserError, match="^a checkpoint's model.head.norm.weight is more than numbers and words"):
        checkpoint.open_run(folder)
    assert not (tmp_path / "made").exists()


def reseal(saved: Path) -> None:
    """Give a checkpoint whose files were changed the checksums of what they are now."""
    info = json.loads((saved / "info.json").read_text())
    info["files"] = {name: found for name, found in checkpoint.checksums(saved).items() if name != "info.json"}
    (saved / "info.json").write_text(json.dumps(info))


def test_an_interrupted_save_leaves_the_last_checkpoint_in_force(tiny, tmp_path, monkeypatch):
    folder = run(tiny, "a", tmp_path=tmp_path)
    opened = checkpoint.open_run(folder)
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(UserError, match="step_00000099.tmp: can't be written .OSError: No space left on device"):
        saving.save(folder, 99, [opened.model], [], {})
    monkeypatch.undo()
    assert checkpoint.open_run(folder).checkpoint.name == "step_00000012"
    assert checkpoint.find(folder)[-1].name == "step_00000012"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume", "runs/nowhere"], "runs/nowhere: no such run"),
        (["configs/defautl.toml"], "configs/defautl.toml: can't be read .*did you mean configs/default.toml?"),
        (["--train.device=cuda"], 'train.device = "cuda": no such device here'),
        (["configs/default.toml", "--train.steps"], "^--train.steps: no value; write --train.steps=VALUE.$"),
        (["configs/default.toml", "--train.steps", "5"], "^--train.steps: no value; write --train.steps=5.$"),
        (["--train.steps", "5", "--seed=3"], "^--train.steps: no value; write --train.steps=5.$"),
        (["--steps", "5"], "^--steps: no value; write --train.steps=5.$"),
        (["--seed", "--resume", "runs/x"], "^--seed: no value; write --seed=VALUE.$"),
        (["--seed", "configs/default.toml"], "^--seed: no value; write --seed=VALUE.$"),
        (["--lst-plugins"], "--lst-plugins: .*did you mean --list-plugins?"),
        (["--resum=runs/x"], r"^--resum: not an option .a key is set as --section.key=value.; did you mean --resume?$"),
        (["--sede=3"], "^--sede: .*did you mean --seed?$"),
        (["-train.steps=3"], "^-train.steps: not an option; did you mean --train.steps=3?$"),
        (["-steps", "3"], "^-steps: not an option; did you mean --train.steps?$"),
        ([""], "^a config file without a name: can't be read .*; give the path of a TOML file.$"),
        (["train.steps=3"], "^train.steps=3: can't be read .*; a key is set as --train.steps=3.$"),
        (["--print-config", "--", "a.toml", "b.toml"], "^b.toml: one config file is enough"),
        (["--resume"], "^argument --resume: expected one argument; see --help.$"),
        (["a.toml", "b.toml"], "^b.toml: one config file is enough; a key of it is set as --section.key=value.$"),
        (["--resume", "runs/x", "configs/default.toml"], "leave out the config file"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    if torch.cuda.is_available() and "--train.device=cuda" in arguments:
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        train.main(arguments)


def test_a_checkpoint_that_is_named_needs_no_latest(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    (folder / "checkpoints" / "latest").unlink()
    with pytest.raises(UserError, match="latest: missing or damaged; name a checkpoint instead: .*/step_00000012$"):
        train.main(["--resume", str(folder), "--train.steps=14"])
    train.main(["--resume", str(folder / "checkpoints" / "step_00000012"), "--train.steps=14"])
    assert len(losses(folder)) == 14


def test_a_log_that_can_not_be_written_is_named():
    logger = load_plugins().get("logger", "jsonl", "test")()
    logger.file = open("/dev/full", "w", buffering=1)
    with pytest.raises(UserError, match="^/dev/full: can't be written .No space left on device.*[.]$"):
        logger.nanopre_step_end(run=None, step=1, metrics={"loss": 1.0})
    logger.nanopre_run_end(run=None, status="failed")
    assert logger.file.closed


def test_a_pipe_that_is_closed_ends_the_script_without_a_traceback():
    command = f"{sys.executable} train.py --list-plugins | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_going_on_with_a_finished_run_says_how(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    with pytest.raises(UserError, match="all 12 steps are done; go on with --train.steps=24"):
        train.main(["--resume", str(folder)])
    train.main(["--resume", str(folder), "--train.steps=14"])
    assert len(losses(folder)) == 14


def test_a_changed_corpus_is_not_resumed(tiny, tmp_path):
    folder = run(tiny, "a", tmp_path=tmp_path)
    with pytest.raises(UserError, match="corpus or tokenizer changed"):
        train.main(["--resume", str(folder), "--train.steps=14", f"--data.corpus={ROOT}/nanopre/*.py"])


@pytest.mark.slow
def test_an_error_on_many_ranks_is_said_once(tiny):
    result = run_script("train.py", *tiny, "--train.batch_size=9", processes=2)
    assert result.returncode != 0
    assert result.stderr.count("train.batch_size = 9 is not divisible by 2 data-parallel ranks; take 8 or 10.") == 1
    assert 'train.py", line' not in result.stderr  # torchrun's own traceback says that a process failed


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_0_and_says_how_to_resume(tiny, tmp_path, which):
    arguments = [sys.executable, "train.py", *tiny, "--train.steps=100000", "--train.eval_interval=100000"]
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "tiny" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(which)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    done = len(losses(tmp_path / "runs" / "tiny"))
    assert f"Stopped after step {done} of 100000; go on with: python train.py --resume" in output
    assert checkpoint.open_run(tmp_path / "runs" / "tiny").info["step"] == done


def test_first_weights_do_not_depend_on_what_else_is_there():
    # A stage of a pipeline holds some blocks only: each parameter comes from its own generator.
    from nanopre.model import ModelConfig, Transformer

    config = ModelConfig(
        vocab_size=64, seq_len=8, d_model=16, n_layers=4, n_heads=2, n_kv_heads=2, d_ff=32, positions="rope",
        norm="rmsnorm", norm_eps=1e-5, activation="swiglu", bias=False, tie_embeddings=False,
    )  # fmt: skip
    whole, part = Transformer(config), Transformer(config)
    del part.embed, part.blocks["0"], part.blocks["2"]
    distributed.initialise(whole, seed=3)
    distributed.initialise(part, seed=3)
    for name, parameter in part.named_parameters():
        assert torch.equal(parameter, dict(whole.named_parameters())[name])
    distributed.initialise(part, seed=4)
    assert not torch.equal(part.blocks["1"].attn.q.weight, whole.blocks["1"].attn.q.weight)
