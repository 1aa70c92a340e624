"""Measured runs: read from tables and from folders that train.py made, and refused where they can't be right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import read_log

import train
from nanopre import UserError, checkpoint
from nanopre.planning.runs import Runs, last_loss, read_runs


def table(folder: Path, text: str, name: str = "points.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def refused(*arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        read_runs(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_whole_numbers_do_not_overflow():
    # 6 N D of a model of 1e11 parameters and 1e13 tokens is 6e24; an int64 ends at 9.2e18 and turns negative.
    n, d = np.array([10**11, 2 * 10**11]), np.array([10**13, 10**13])
    assert (6 * n * d != [6e24, 12e24]).all()
    runs = Runs(n, d, np.array([2, 2]))
    np.testing.assert_array_equal(runs.flops, [6e24, 12e24])
    assert all(getattr(runs, name).dtype == np.float64 for name in ("params", "tokens", "loss", "flops", "unique_tokens"))


def test_a_table_with_whole_numbers_does_not_overflow(tmp_path):
    for name, text in (
        ("a.csv", "params,tokens,loss\n100000000000,10000000000000,2\n"),
        ("a.jsonl", '{"params": 100000000000, "tokens": 10000000000000, "loss": 2}\n'),
    ):
        assert read_runs([table(tmp_path, text, name)]).flops == [6e24]


def test_what_a_table_leaves_out_has_its_default(tmp_path):
    path = table(tmp_path, "N,D,nats,run,flops,unique_tokens\n1e6,1e8,4,a,,5e7\n2e6,1e8,3.5,a,1e15,\n2e6,2e8,3.4,,,9e9\n")
    runs = read_runs([path], {"params": "N", "tokens": "D", "loss": "nats"})
    np.testing.assert_allclose(runs.flops, [6e14, 1e15, 2.4e15])
    np.testing.assert_allclose(runs.unique_tokens, [5e7, 1e8, 2e8])  # never more than there are
    assert runs.run[0] == runs.run[1] != runs.run[2]
    assert np.isnan(runs.embedding_params).all()
    assert list(runs.last().loss) == [3.5, 3.4]


def test_points_of_two_files_are_different_runs(tmp_path):
    a, b = (table(tmp_path, "params,tokens,loss,run\n1e6,1e8,4,x\n", name) for name in ("a.csv", "b.csv"))
    assert len(np.unique(read_runs([a, b]).run)) == 2


HEAD = "params,tokens,loss\n"


@pytest.mark.parametrize(
    "name, text, options, sentence",
    [
        ("a.csv", "param,tokens,loss\n1,1,1\n", {}, "line 2: there is no column params; did you mean param? (--column params="),
        ("a.csv", HEAD + "1,1,1\n", {"params": "M"}, "line 2: there is no column M; choose from loss, params, tokens."),
        ("a.csv", HEAD + "1e6,1e8,4\n1e6,-2,4\n", {}, "line 3: tokens is -2; it must be above zero and finite."),
        ("a.csv", HEAD + "1e6,1e8,nan\n", {}, "line 2: loss is nan; it must be above zero and finite."),
        ("a.csv", HEAD + "1e6,1e8,inf\n", {}, "line 2: loss is inf; it must be above zero and finite."),
        ("a.csv", HEAD + "1e6,many,4\n", {}, "line 2: tokens is 'many'; it must be a number."),
        ("a.csv", HEAD + "1e6,1e8\n", {}, "line 2: loss is None; it must be a number."),
        ("a.csv", HEAD + "1e6,,4\n", {}, "line 2: tokens is ''; it must be a number."),
        ("a.csv", HEAD, {}, "there is no point in it."),
        ("a.jsonl", '{"params": 1}\n{"params": \n', {}, "line 1: there is no column tokens"),
        ("a.jsonl", '\n{"params": \n', {}, "line 2: not JSON (Expecting value)."),
        ("a.jsonl", "[1]\n", {}, 'line 1: not an object like {"params": 1e6, "tokens": 1e8, "loss": 4.2}.'),
        ("a.jsonl", '{"params": 1, "tokens": 1, "loss": true}\n', {}, "line 1: loss is True; it must be a number."),
        ("a.csv", "params,tokens,loss,embedding_params\n1,1,1,1\n", {}, "line 2: embedding_params is 1; it must be below"),
        ("a.txt", "", {}, "neither a run's folder nor a .csv or .jsonl file."),
    ],
)
def test_a_table_that_can_not_be_right(tmp_path, name, text, options, sentence):
    said = refused([table(tmp_path, text, name)], options)
    assert said.startswith(str(tmp_path / name)) and sentence in said


def test_columns_after_blanks_embeddings_of_none_and_a_file_named_twice(tmp_path):
    path = table(tmp_path, "params, tokens, loss, outside\n1e6, 1e8, 3, 0\n")
    runs = read_runs([path, path], {"embedding_params": "outside"})
    assert list(runs.tokens) == [1e8] and list(runs.embedding_params) == [0]


def test_what_is_no_table(tmp_path):
    assert refused([tmp_path / "none"]) == f"{tmp_path / 'none'}: there is no such file or folder."
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    assert refused([tmp_path / "binary.csv"]).startswith(f"{tmp_path / 'binary.csv'}: not a table of text")
    assert refused([tmp_path]) == f"{tmp_path}: not a run's folder (it has no log.jsonl)."
    assert refused([]) == "there are no runs; name folders of runs, or .csv or .jsonl files."
    assert refused(["a.csv"], {"param": "N"}) == "--column param=N: there is no column param; did you mean params?"


def test_cut_goes_along_the_curve_and_never_beyond_it():
    # Along a power law straight lines in logarithms are exact.
    tokens = np.geomspace(1e8, 1e10, 5)
    runs = Runs(np.full(5, 1e6), tokens, 10 * tokens**-0.1, run=np.full(5, 7))
    cut = runs.cut(7, np.array([1e14, 6e14, 1e15, 6e16, 1e17]))
    np.testing.assert_allclose(cut.tokens, [np.nan, 1e8, 1e15 / 6e6, 1e10, np.nan])
    np.testing.assert_allclose(cut.loss, 10 * cut.tokens**-0.1)


def test_without_embeddings():
    runs = Runs([1e6, 2e6], [1e8, 1e8], [4.0, 3.9], embedding_params=[4e5, 5e5]).without_embeddings()
    np.testing.assert_allclose(runs.params, [6e5, 15e5])
    np.testing.assert_allclose(runs.flops, [3.6e14, 9e14])
    with pytest.raises(UserError, match="embedding_params: not known of every point"):
        Runs([1e6], [1e8], [4.0]).without_embeddings()


def test_a_run_that_train_made(tiny, tmp_path):
    train.main([*tiny, "--train.steps=24", "--train.batch_size=64"])
    run_dir = tmp_path / "runs" / "tiny"
    steps, evaluations = read_log(run_dir)
    runs = read_runs([run_dir])
    assert len(runs) == 4 and list(runs.loss) == [line["val_loss"] for line in evaluations]
    np.testing.assert_array_equal(runs.tokens, np.array([6, 12, 18, 24]) * 64 * 48)
    model = checkpoint.open_run(run_dir).model
    blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("blocks.", "head.norm")))
    assert (runs.params == sum(p.numel() for p in model.parameters())).all()
    assert (runs.params - runs.embedding_params == blocks).all()
    assert (runs.flops == 6 * runs.params * runs.tokens).all() and len(set(runs.run)) == 1
    assert runs.d_model[0] == 32 and runs.n_layers[0] == 2 and runs.batch_size[0] == 64 * 48
    epochs = np.array([line["epoch"] for line in steps])[5::6]
    np.testing.assert_allclose(runs.unique_tokens, np.minimum(runs.tokens, runs.tokens / epochs))
    assert (runs.unique_tokens < runs.tokens).any() and epochs.max() > 1
    # The log's own name, and another metric of it.
    assert list(read_runs([run_dir / "log.jsonl"], metric="loss").loss) == [line["loss"] for line in steps]
    sentence = refused([run_dir], metric="val_los")
    assert sentence == f"{run_dir / 'log.jsonl'}: no line has val_los; did you mean val_loss?"
    assert refused([run_dir.parent]).endswith(f"(it has no log.jsonl); of those in it say {run_dir.parent}/*.")
    # A skipped step has no finite loss, which JSON writes as NaN; a killed run has half of a last line.
    file, log = run_dir / "log.jsonl", (run_dir / "log.jsonl").read_text()
    file.write_text(log + json.dumps({"step": 24, "val_loss": float("nan")}) + '\n{"step": 25, "lo')
    assert len(read_runs([run_dir])) == 4 and last_loss(file) is None
    for line, sentence in (
        ('{"val_loss": 4}', "has no step; it is none of a run that train.py made."),
        ('{"step": 24, "val_loss": "x"}', "loss is 'x'; it must be a number."),
        ('{"step": 24, "val_loss": null}', "loss is None; it must be a number."),
        ('{"step": 25, "tokens": null}', "tokens is None; it must be a number."),
        ('{"step": ', "not JSON (Expecting value)."),
    ):
        file.write_text(log + line + "\n")
        assert refused([run_dir]) == f"{file}, line {len(log.splitlines()) + 1}: {sentence}"
        if "tokens" not in line:  # which a last loss needs not
            with pytest.raises(UserError, match=re.escape(sentence)):
                last_loss(file)
    file.write_bytes(b"\xff\xfe\n")
    assert refused([run_dir]).startswith(f"{file}: not a log of text")
