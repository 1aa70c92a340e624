"""sample.py as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT

import sample
import train
from nanopre import UserError, checkpoint
from nanopre.generate import generate


@pytest.fixture
def trained(tiny, tmp_path, capsys):
    train.main([*tiny, "--train.steps=40"])
    capsys.readouterr()
    return tmp_path / "runs" / "tiny"


def test_samples_are_those_of_generate(trained, capsys):
    sample.main([str(trained), "--prompt", "The cat", "--tokens", "30", "--top-k", "5", "--seed", "7", "--num-samples", "2"])
    output = capsys.readouterr().out
    opened = checkpoint.open_run(trained)
    expected = ""
    for i in range(2):
        tokens = generate(
            opened.model, list(b"The cat"), 30, 0.8, top_k=5, generator=torch.Generator().manual_seed(7 + i),
            n_vocab=opened.tokenizer.n_vocab, stop=opened.tokenizer.eot,
        )  # fmt: skip
        expected += f"--- sample {i + 1} ---\nThe cat{opened.tokenizer.decode(list(tokens))}\n"
    assert output == expected


def test_characters_of_several_tokens_are_streamed_whole(trained, capsys, monkeypatch):
    # Bytes of "é" and "漢" as separate tokens, then a character that stays unfinished.
    made = [*"é漢x".encode(), "漢".encode()[0]]
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter(made))
    sample.main([str(trained)])
    assert capsys.readouterr().out == "é漢x\N{REPLACEMENT CHARACTER}\n"


def test_the_prompt_from_stdin(trained):
    command = [sys.executable, "sample.py", str(trained), "--prompt", "-", "--tokens", "5", "--temperature", "0"]
    result = subprocess.run(command, input="A dog", capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("A dog")
    missing = subprocess.run(
        [sys.executable, "sample.py", str(trained.parent / "nope")],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert missing.returncode == 2
    assert missing.stderr == f"sample.py: {trained.parent / 'nope'}: no such run; there are {trained}.\n"


@pytest.mark.parametrize("arguments", [["--top-p", "1.5"], ["--tokens", "0"], ["--temperature", "-1"], ["--top-k", "x"]])
def test_impossible_options_name_themselves(trained, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        sample.main([str(trained), *arguments])
    assert exit.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_run_without_a_checkpoint(trained):
    (trained / "checkpoints" / "latest").unlink()
    with pytest.raises(UserError, match="no checkpoint yet"):
        sample.main([str(trained)])
